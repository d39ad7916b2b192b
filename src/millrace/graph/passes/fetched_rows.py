"""Gradients of a step whose embedding tables are elsewhere: only the rows that a batch names come and go.

A table that is read by lookups alone need not be there to compute a batch's gradients. Which rows the batch names is
known from the batch (`indices`); they are fetched, each once, and the lookups look among them. What goes back is the
gradient of these rows. The cost does not depend on the table's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import Node

from millrace.errors import FeedError, SettingError
from millrace.graph.graph import INFO, Graph, copy_fx, feed_key, info, set_output, spec_of, step_module
from millrace.graph.passes.extract import ancestors, extract
from millrace.graph.passes.halves import Halves
from millrace.graph.signature import Feed, TensorSpec

aten = torch.ops.aten

# Of all of these argument 0 is the table and argument 1 the indices; of their gradients argument 1 are the indices.
_LOOKUPS = (aten.embedding.default, aten._embedding_bag.default)
_GRADIENTS = (aten.embedding_dense_backward.default, aten._embedding_bag_backward.default)
_BAG_PADDING = {aten._embedding_bag.default: 8, aten._embedding_bag_backward.default: 11}  # where it stands


@dataclass(frozen=True)
class Table:
    """A table whose rows are fetched. name: of the variable, [rows, width]. exchanged: the name of its gradient."""

    name: str
    spec: TensorSpec
    exchanged: str

    @property
    def rows_feed(self) -> str:
        """The feed of `gradients` with the fetched rows: [K, width], K being how many indices the batch has in all."""
        return f"rows/{self.name}"

    @property
    def places_feed(self) -> str:
        """The feed of `gradients` that says where among the fetched rows each index finds its own: int64 [K]."""
        return f"places/{self.name}"

    @property
    def indices_fetch(self) -> str:
        """The fetch of `indices` with all indices of the batch, int64 [K], and the feed of a row update with those of
        the rows that it is for."""
        return f"indices/{self.name}"


@dataclass(frozen=True)
class FetchedRows:
    """What a worker runs in place of `Halves.gradients`.

    gradients: reads no table. A batch for it is a dict by the names of its feeds: those of the step, then of each table
        the rows and the places. What it exchanges for a table is the gradient of the fetched rows, [K, width]; those
        that no place names have gradient zero.
    indices: takes the step's own batch; fetches each table's `indices_fetch`.
    exchanged: as in Halves, for this size of batch.
    """

    gradients: Graph
    indices: Graph
    tables: tuple[Table, ...]
    exchanged: tuple[Feed, ...]


def fetched_rows(cut: Halves, names: Sequence[str] | None = None) -> FetchedRows:
    """Let `gradients` have the rows that it looks up instead of whole tables.

    Args: names: which variables; None for all for which it is possible (see `row_tables`).

    Raises: SettingError for a variable that is not only looked up in, with the reason.
    """
    exchanged = {feed.name: feed for feed in cut.exchanged}
    found = row_tables(cut) if names is None else tuple(_table(cut.gradients, name, exchanged) for name in names)
    gradients = _rewritten(cut.gradients, found)
    specs = {node.name: spec_of(node) for node in gradients.fx.nodes}
    feeds = []
    for feed in cut.exchanged:
        spec = specs[gradients.fetches[feed.name]]
        assert spec is not None
        feeds.append(Feed(feed.name, spec))
    return FetchedRows(gradients, _indices(cut.gradients, found), found, tuple(feeds))


def row_tables(cut: Halves) -> tuple[Table, ...]:
    """The variables whose rows can be fetched: those that are only looked up in, by numbers that the batch brings."""
    exchanged = {feed.name: feed for feed in cut.exchanged}
    return tuple(_table(cut.gradients, name, exchanged) for name, reason in looked_up(cut).items() if not reason)


def looked_up(cut: Halves) -> dict[str, str]:
    """The trained variables that are looked up in, each with why its rows cannot be fetched; "" where they can."""
    exchanged = {feed.name: feed for feed in cut.exchanged}
    inputs = cut.gradients.placeholders()
    found = {}
    for variable in cut.gradients.variables:
        read = any(
            user.target in _LOOKUPS and user.args[0] is inputs[variable.name] for user in inputs[variable.name].users
        )
        if read and f"gradient/{variable.name}" in exchanged:
            found[variable.name] = _reason(cut.gradients, variable.name, exchanged)
    return found


def lookups_in(cut: Halves, name: str) -> int:
    """How many indices a batch has for a table."""
    table = cut.gradients.placeholders()[name]
    return sum(int(index.meta["val"].numel()) for index in _index_nodes(table))


def unique_rows(indices: Tensor, height: int) -> tuple[Tensor, Tensor]:
    """Each row that a batch names once, and where each index finds its own.

    Args: indices: int64 [K]. height: how many rows the table has.

    Returns: (rows int64 [U], ascending; places int64 [K] with rows[places] = indices).

    Raises: FeedError for an index that the table does not have.
    """
    rows, places = torch.unique(indices, return_inverse=True)
    if len(rows) and (int(rows[0]) < 0 or int(rows[-1]) >= height):
        wrong = int(rows[0]) if int(rows[0]) < 0 else int(rows[-1])
        raise FeedError(f"an index of the batch is {wrong}, but the table has the rows 0 to {height - 1}")
    return rows, places


def padded(rows: Tensor, count: int) -> Tensor:
    """Fetched rows [U, width] with rows of zeros after them: [count, width]."""
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])


def summed_rows(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Row gradients of several slices as one: (rows, values) pairs -> each row once, ascending, with its sum."""
    named, values = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    rows, places = torch.unique(named, return_inverse=True)
    return rows, values.new_zeros(len(rows), *values.shape[1:]).index_add_(0, places, values)


# -- which tables ------------------------------------------------------------------------------------------------


def _table(graph: Graph, name: str, exchanged: dict[str, Feed]) -> Table:
    reason = _reason(graph, name, exchanged)
    if reason:
        raise SettingError(f"the rows of {name!r} cannot be fetched one by one: {reason}. Keep it whole.")
    return Table(name, graph.variable(name).spec, f"gradient/{name}")


def _reason(graph: Graph, name: str, exchanged: dict[str, Feed]) -> str:
    table, gradient = graph.placeholders()[name], f"gradient/{name}"
    reason = _other_reader(graph, table)
    if not reason and name in graph.updates:
        reason = "the forward pass changes it"
    if not reason and gradient not in exchanged:
        reason = f"the update does not read {gradient!r}"
    if not reason:
        reason = _other_gradient(graph.node(graph.fetches[gradient]), set(_index_nodes(table)), set())
    return reason


def _other_reader(graph: Graph, table: Node) -> str:
    """Why a variable is not only looked up in; "" if it is."""
    feeds = {graph.placeholders()[feed_key(feed.name)] for feed in graph.feeds}
    if not table.users:
        return "nothing reads it"
    for user in table.users:
        where = f" ({info(user).line})" if info(user).line else ""
        if user.target not in _LOOKUPS or table in user.args[1:]:
            return f"{user.name!r}{where} reads it, which is no lookup"
        if _bag_padding(user) >= 0:
            return f"{user.name!r}{where} is a bag with a padding index, which is not the same among rows"
        index = user.args[1]
        assert isinstance(index, Node)
        if any(n.op == "placeholder" and n not in feeds for n in ancestors([index])):
            return f"the indices of {user.name!r} depend on variables"
    return ""


def _other_gradient(node: Node, indices: set[Node], sums: set[Node]) -> str:
    """Why a gradient is not only a sum of gradients of lookups; "" if it is."""
    for user in node.users:
        if user.op != "output" and user not in sums:
            return f"{user.name!r} reads its gradient before the update"
    if node.target in _GRADIENTS:
        return "" if node.args[1] in indices else f"{node.name!r} is the gradient of another lookup"
    if node.target is aten.add.Tensor and not node.kwargs and len(node.all_input_nodes) == 2:
        reasons = (_other_gradient(argument, indices, sums | {node}) for argument in node.all_input_nodes)
        return next((reason for reason in reasons if reason), "")
    return f"its gradient {node.name!r} is not that of lookups alone"


def _lookups(table: Node) -> list[Node]:
    return list(table.users)


def _index_nodes(table: Node) -> list[Node]:
    """The different indices by which it is looked up in, in order."""
    return list(dict.fromkeys(_index(lookup) for lookup in _lookups(table)))


def _index(lookup: Node) -> Node:
    index = lookup.args[1]
    assert isinstance(index, Node)
    return index


def _bag_padding(node: Node) -> int:
    """The padding index of a bag, or of its gradient; -1 for none."""
    place = _BAG_PADDING.get(node.target, len(node.args))  # type: ignore[call-overload]
    found = node.args[place] if len(node.args) > place else -1
    return found if isinstance(found, int) else -1


# -- rewriting ---------------------------------------------------------------------------------------------------


def _rewritten(graph: Graph, tables: tuple[Table, ...]) -> Graph:
    fx, mapping = copy_fx(graph.module)
    by_name = {old.name: new for old, new in mapping.items()}
    inputs = {name: mapping[node] for name, node in graph.placeholders().items()}
    feeds = list(graph.feeds)
    last = [node for node in fx.nodes if node.op == "placeholder"][-1]
    for table in tables:
        build = _Build(fx, inputs[table.name])
        indices = _index_nodes(inputs[table.name])
        count = sum(index.meta["val"].numel() for index in indices)
        shapes = (table.spec.dtype, (count, *table.spec.shape[1:])), (torch.int64, (count,))
        made = []
        for name, (dtype, shape) in zip((table.rows_feed, table.places_feed), shapes, strict=True):
            last = build.placeholder(name, dtype, shape, after=last)
            made.append(last)
            feeds.append(Feed(name, TensorSpec(shape, dtype, table.spec.device)))
        build.lookups(made[0], made[1], indices)
        build.gradient(by_name[graph.fetches[table.exchanged]], made[0])
    whole = graph.with_(
        module=step_module(graph.module, fx),
        feeds=tuple(feeds),
        feed_tree=pytree.treespec_dumps(pytree.tree_structure(dict.fromkeys([f.name for f in feeds], 0))),
    )
    fetches = {name: by_name[node] for name, node in graph.fetches.items()}
    found = extract(whole, fetches, {name: by_name[node] for name, node in graph.updates.items()})
    if graph.retrace is None:
        return found
    return found.with_(retrace=lambda batch: _again(graph, batch, tables))


def _again(graph: Graph, batch: Any, tables: tuple[Table, ...]) -> Graph:
    assert graph.retrace is not None
    own = [batch[feed.name] for feed in graph.feeds]
    return _rewritten(graph.retrace(pytree.tree_unflatten(own, pytree.treespec_loads(graph.feed_tree))), tables)


def _indices(graph: Graph, tables: Iterable[Table]) -> Graph:
    fx, mapping = copy_fx(graph.module)
    inputs = {name: mapping[node] for name, node in graph.placeholders().items()}
    fetches: dict[str, Node] = {}
    output = next(iter(fx.find_nodes(op="output")))
    for table in tables:
        build = _Build(fx, inputs[table.name])
        lookup = _lookups(inputs[table.name])[0]
        with fx.inserting_before(output):
            flat = [build.call(lookup, aten.reshape.default, n, [-1]) for n in _index_nodes(inputs[table.name])]
            joined = build.call(lookup, aten.cat.default, flat)
            fetches[table.indices_fetch] = build.call(lookup, aten._to_copy.default, joined, dtype=torch.int64)
    set_output(fx, list(fetches.values()))
    whole = graph.with_(module=step_module(graph.module, fx), fetches={}, updates={})
    found = extract(whole, fetches, {})
    again = graph.retrace
    return found if again is None else found.with_(retrace=lambda batch: _indices(again(batch), tables))


class _Build:
    """Adds nodes for one table."""

    def __init__(self, fx: torch.fx.Graph, table: Node) -> None:
        self._fx, self._table = fx, table
        self._mode = table.meta["val"].fake_mode
        self._places: dict[Node, Node] = {}  # of an index node

    def call(self, source: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A node that comes from where `source` does."""
        node = self._fx.call_function(target, args, kwargs)
        with self._mode:
            fakes = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
            node.meta = {INFO: info(source), "val": target(*fakes[0], **fakes[1])}
        return node

    def placeholder(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], after: Node) -> Node:
        with self._fx.inserting_after(after):
            node = self._fx.placeholder("feed_" + "".join(c if c.isalnum() else "_" for c in name))
        with self._mode:
            node.meta = {"val": torch.empty(shape, dtype=dtype, device=self._table.meta["val"].device)}
        return node

    def lookups(self, rows: Node, places: Node, indices: Iterable[Node]) -> None:
        """Look among the fetched rows."""
        lookups, start = _lookups(self._table), 0
        for index in indices:
            shape, source = index.meta["val"].shape, lookups[0]
            with self._fx.inserting_before(lookups[0]):
                own = self.call(source, aten.slice.Tensor, places, 0, start, start + shape.numel())
                self._places[index] = self.call(source, aten.reshape.default, own, list(shape))
            start += shape.numel()
        for lookup in lookups:
            lookup.args = (rows, self._places[_index(lookup)], *lookup.args[2:])

    def gradient(self, node: Node, rows: Node) -> None:
        """The gradient of the fetched rows in place of the table's."""
        for part in self._parts(node, rows.meta["val"]):
            index, height = _index(part), rows.meta["val"].shape[0]
            if part.target is aten._embedding_bag_backward.default:
                part.args = (part.args[0], self._places[index], *part.args[2:6], height, *part.args[7:])
                continue
            outer, _, _, padding, by_frequency = part.args
            if isinstance(padding, int) and padding >= 0:
                with self._fx.inserting_before(part):
                    is_padding = self.call(part, aten.eq.Scalar, index, padding)
                    is_padding = self.call(part, aten.unsqueeze.default, is_padding, -1)
                    outer = self.call(part, aten.masked_fill.Scalar, outer, is_padding, 0)
            part.args = (outer, self._places[index], height, -1, by_frequency)

    def _parts(self, node: Node, value: Tensor) -> Iterator[Node]:
        """The gradients of single lookups that `node` sums up; every sum becomes one of rows, like `value`."""
        with self._mode:
            node.meta["val"] = torch.empty_like(value)
        if node.target in _GRADIENTS:
            yield node
        else:
            for argument in node.all_input_nodes:
                yield from self._parts(argument, value)
