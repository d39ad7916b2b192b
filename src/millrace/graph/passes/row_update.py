"""The update of a table of which only some rows have a gradient: these rows, and their slots, are updated alone.

This is what optimizers for sparse gradients do, and it is not always the update of the whole table: the rows that no
batch names stay as they are, so that their momentum does not move them, their moments do not decay and no weight decay
shrinks them until they are named again. For SGD and Adagrad without weight decay, which leave a row with gradient zero
alone, it is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import Node

from millrace.errors import SettingError
from millrace.graph.graph import INFO, Graph, NodeInfo, copy_fx, feed_key, info, set_output, spec_of, step_module
from millrace.graph.passes.splitting.elementwise import is_elementwise
from millrace.graph.signature import Feed, Phase, TensorSpec

aten = torch.ops.aten


def row_update(update: Graph, counts: Mapping[str, int]) -> Graph:
    """`update` with the gradients of rows in place of those of whole tables; its cost does not depend on their size.

    For a table there is the feed "indices/<table>", int64 [U], which names every row once, and "gradient/<table>" is
    [U, width], the gradients of these rows. What else the update does it does as before. Run eagerly, the graph takes
    any U; a session traces it again for each.

    Args: update: as `halves` or `shards` makes it. counts: U for each table by name.

    Raises: SettingError for an update that does not work element by element, naming node and line.
    """
    fx, mapping = copy_fx(update.module)
    inputs = {name: mapping[node] for name, node in update.placeholders().items()}
    by_name = {old.name: new for old, new in mapping.items()}
    updates = {name: by_name[node] for name, node in update.updates.items()}
    last = [node for node in fx.nodes if node.op == "placeholder"][-1]
    feeds = {feed.name: feed for feed in update.feeds}
    for name, count in counts.items():
        table = _TableRows(update, fx, inputs, name, count)
        last = table.gather(last)
        table.narrow()
        table.check_results({name: by_name[node] for name, node in update.fetches.items()}, updates)
        updates |= {owned: table.scatter(owned, updates[owned]) for owned in table.owned if owned in updates}
        feeds |= {feed.name: feed for feed in table.feeds()}
    fetches = {name: by_name[node] for name, node in update.fetches.items()}
    set_output(fx, [*fetches.values(), *updates.values()])
    fx.eliminate_dead_code()
    names: dict[str, Any] = dict.fromkeys(feeds, 0)
    return update.with_(
        module=step_module(update.module, fx),
        feeds=tuple(feeds.values()),
        updates={name: node.name for name, node in updates.items()},
        feed_tree=pytree.treespec_dumps(pytree.tree_structure(names)),
        retrace=lambda batch: row_update(update, {name: len(batch[f"indices/{name}"]) for name in counts}),
    )


class _TableRows:
    """One table's part of an update, on some of its rows."""

    def __init__(self, update: Graph, fx: torch.fx.Graph, inputs: Mapping[str, Node], name: str, count: int) -> None:
        self._fx, self._name, self._count, self._inputs = fx, name, count, inputs
        self._spec = update.variable(name).spec
        key = feed_key(f"gradient/{name}")
        if key not in inputs or name not in update.updates or not self._spec.shape:
            raise SettingError(
                f"{name!r} cannot be updated by rows: the update has no gradient of it, or it has no rows."
            )
        self._gradient = inputs[key]
        self.owned = [v.name for v in update.variables if v.owner == name and v.spec.shape == self._spec.shape]
        self._mode = inputs[name].meta["val"].fake_mode
        self._rows: set[Node] = {self._gradient}  # what has one row for each index

    def feeds(self) -> list[Feed]:
        """The feeds that it has in place of the whole gradient."""
        gradient = TensorSpec.of(self._gradient.meta["val"])
        indices = TensorSpec((self._count,), torch.int64, self._spec.device)
        return [Feed(f"gradient/{self._name}", gradient), Feed(f"indices/{self._name}", indices)]

    def gather(self, last: Node) -> Node:
        """Take the rows of the table and its slots; returns the placeholder of the indices, which is after `last`."""
        spec, value = self._spec, self._gradient.meta["val"]
        with self._mode:
            self._gradient.meta["val"] = value.new_empty(self._count, *spec.shape[1:])
            indices = torch.empty(self._count, dtype=torch.int64, device=value.device)
        with self._fx.inserting_after(last):
            self._indices = self._fx.placeholder("feed_indices_" + self._inputs[self._name].name)
        self._indices.meta = {"val": indices}
        first = next(node for node in self._fx.nodes if node.op not in ("placeholder", "get_attr"))
        for owned in self.owned:
            whole = self._inputs[owned]
            readers = list(whole.users)
            with self._fx.inserting_before(first):
                rows = self._call(aten.index.Tensor, whole, [self._indices])
            for reader in readers:
                reader.replace_input_with(whole, rows)
            self._rows.add(rows)
        return self._indices

    def narrow(self) -> None:
        """Let everything that is computed with the rows be computed for them alone."""
        for node in list(self._fx.nodes):
            if node.op != "call_function" or node in self._rows or self._rows.isdisjoint(node.all_input_nodes):
                continue
            others = [n for n in node.all_input_nodes if n not in self._rows]
            if not is_elementwise(node.target):
                raise self._refused(node, "does not work element by element")
            if any((spec := spec_of(n)) is None or spec.shape for n in others):
                raise self._refused(node, "reads other tensors than its slots")
            with self._mode:
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                node.meta = {**node.meta, "val": node.target(*args, **kwargs)}
            self._rows.add(node)

    def scatter(self, owned: str, rows: Node) -> Node:
        """The variable with its new rows."""
        output = next(iter(self._fx.find_nodes(op="output")))
        with self._fx.inserting_before(output):
            return self._call(aten.index_put.default, self._inputs[owned], [self._indices], rows)

    def _call(self, target: Any, *args: Any) -> Node:
        node = self._fx.call_function(target, args)
        with self._mode:
            fakes = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
            node.meta = {INFO: NodeInfo(phase=Phase.UPDATE, variable=self._name), "val": target(*fakes)}
        return node

    def check_results(self, fetches: Mapping[str, Node], updates: Mapping[str, Node]) -> None:
        """Whether the rows lead to the new values of the table and its slots, and to nothing else."""
        for name, node in [*fetches.items(), *updates.items()]:
            if (node in self._rows) != (name in updates and name in self.owned):
                raise self._refused(node, f"makes {name!r}")

    def _refused(self, node: Node, why: str) -> SettingError:
        line = f" ({info(node).line})" if info(node).line else ""
        return SettingError(
            f"{self._name!r} cannot be updated by rows: {node.name!r}{line} {why}. Keep the table whole, "
            "or use an optimizer that treats each number by itself, such as Adagrad, without clipping by the norm."
        )
