"""A batch in several parts, whose gradients are put together before the update.

Devices that hold different layers can then work at different parts of one batch at the same time (Huang et al., 2019,
"GPipe"). Forward and backward nodes stand once for every part, update nodes once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import Node

from millrace.errors import SettingError
from millrace.graph.graph import INFO, Graph, feed_key, info, set_output, step_module
from millrace.graph.passes.prune import prune
from millrace.graph.signature import Feed, Phase, Role, TensorSpec

aten = torch.ops.aten

MICROBATCH = "microbatch"  # the key in Node.meta of the part that a node works at


def microbatch(graph: Graph, count: int, *, reduction: str = "mean") -> Graph:
    """`graph` with its batch in `count` equal parts along the first axis.

    The feeds are those of the first part, then those of the second, …, named "0.images", "0.labels", "1.images", …. A
    floating scalar or a gradient that is fetched is the mean (or sum) over the parts, an integer one the sum, and what
    has a value for every example is put together again. What the forward pass itself changes (the statistics of
    BatchNorm, the random stream) goes from part to part, so that BatchNorm and dropout see the parts as batches of
    their own.

    Args:
        count: how many parts.
        reduction: how the loss treats the examples of a batch: "mean", or "sum".

    Raises: SettingError when the batch cannot be divided, or the step cannot be taken in parts.
    """
    if reduction not in ("mean", "sum"):
        raise SettingError(f"reduction={reduction!r}: expected 'mean' or 'sum'")
    if count == 1:
        return graph
    return _Parts(graph, _part_of(graph, count), count, reduction).result()


def _part_of(graph: Graph, count: int) -> Graph:
    """The graph of the step for one part of the batch."""
    sizes = {feed.spec.shape[:1] for feed in graph.feeds}
    if len(sizes) != 1 or () in sizes:
        shapes = ", ".join(f"{feed.name} {list(feed.spec.shape)}" for feed in graph.feeds)
        raise SettingError(
            f"microbatches={count}: the feeds must all have the batch as their first axis, but they are {shapes}."
        )
    ((size,),) = sizes
    if size % count:
        raise SettingError(f"microbatches={count} does not divide a batch of {size} evenly. Choose another batch size.")
    if graph.retrace is None:
        raise SettingError(
            f"microbatches={count}: a graph that was loaded from a file cannot be traced for a smaller batch."
        )
    parts = [
        torch.zeros((size // count, *f.spec.shape[1:]), dtype=f.spec.dtype, device=f.spec.device) for f in graph.feeds
    ]
    part = graph.retrace(pytree.tree_unflatten(parts, pytree.treespec_loads(graph.feed_tree)))
    if part.variables != graph.variables or not graph.fetches.keys() <= part.fetches.keys():
        raise SettingError(
            f"microbatches={count}: for a batch of {size // count} the step has other variables or results."
        )
    return prune(part, list(graph.fetches), graph.updates)


class _Parts:
    def __init__(self, whole: Graph, part: Graph, count: int, reduction: str) -> None:
        self._whole, self._part, self._count, self._reduction = whole, part, count, reduction
        self._fx = torch.fx.Graph()
        self._inputs = part.placeholders()
        self._repeated = self._repeated_nodes()
        self._varying = self._varying_nodes()
        # What a later part sees of each variable.
        self._values = {v.name: self._input(self._inputs[v.name]) for v in part.variables}
        self._copies: list[dict[Node, Node]] = []  # of each part: old node -> new
        self._sums: dict[Node, Node] = {}

    def result(self) -> Graph:
        variables = {self._inputs[name]: node for name, node in self._values.items()}
        sources = [self._inputs[feed_key(feed.name)] for feed in self._part.feeds]
        feeds = [[self._input(node, f"part{i}_{node.name}") for node in sources] for i in range(self._count)]
        fetched = {self._part.node(n) for n in self._part.fetches.values()}
        added = self._read_by_update() | (fetched & self._repeated)
        for index in range(self._count):
            self._append(index, dict(zip(sources, feeds[index], strict=True)))
            for node in self._part.fx.nodes:  # at once, so that no part's gradients are kept
                if node in added and node in self._varying and isinstance(node.meta.get("val"), Tensor):
                    self._add(node, self._copies[index][node])
        once = self._update(variables)
        new_values = {name: self._part.node(node) for name, node in self._part.updates.items()}
        updates = {n: self._values[n] if node in self._repeated else once[node] for n, node in new_values.items()}
        fetches = {name: self._fetch(name, once) for name in self._part.fetches}
        set_output(self._fx, [*fetches.values(), *updates.values()])
        self._fx.eliminate_dead_code()
        return self._whole.with_(
            module=step_module(self._part.module, self._fx),
            feeds=tuple(Feed(f"{i}.{f.name}", f.spec) for i in range(self._count) for f in self._part.feeds),
            fetches={name: node.name for name, node in fetches.items()},
            updates={name: node.name for name, node in updates.items()},
            retrace=None,
        )

    # -- which nodes stand how often -----------------------------------------------------------------------------

    def _repeated_nodes(self) -> set[Node]:
        """Those that stand once for every part: forward and backward, and what counts the random numbers drawn."""
        repeated = {n for n in self._part.nodes if info(n).phase is not Phase.UPDATE}
        drawn = [v.name for v in self._part.variables if v.role is Role.RANDOM and v.name in self._part.updates]
        waiting = [self._part.node(self._part.updates[name]) for name in drawn]
        while waiting:
            node = waiting.pop()
            if node.op == "call_function" and node not in repeated:
                repeated.add(node)
                waiting += node.all_input_nodes
        for node in repeated:
            for argument in node.all_input_nodes:
                if argument.op == "call_function" and argument not in repeated:
                    raise SettingError(
                        f"microbatches={self._count}: {node.name!r} ({info(node).line or 'forward'}) reads "
                        f"{argument.name!r}, which an optimizer has already changed. A step that goes on computing "
                        "with new weights (as adversarial pairs do) cannot be taken in parts."
                    )
        return repeated

    def _varying_nodes(self) -> set[Node]:
        """Those whose value depends on the part."""
        new_values = {name: self._part.node(node) for name, node in self._part.updates.items()}
        passed_on = {self._inputs[name] for name, node in new_values.items() if node in self._repeated}
        varying = {self._inputs[feed_key(feed.name)] for feed in self._part.feeds} | passed_on
        for node in self._part.nodes:
            if any(argument in varying for argument in node.all_input_nodes):
                varying.add(node)
        return varying

    def _read_by_update(self) -> set[Node]:
        once = [n for n in self._part.nodes if n not in self._repeated]
        return {argument for node in once for argument in node.all_input_nodes if argument in self._repeated}

    # -- building ------------------------------------------------------------------------------------------------

    def _append(self, index: int, feeds: Mapping[Node, Node]) -> None:
        """The repeated nodes, for one part."""
        copies = {self._inputs[name]: node for name, node in self._values.items()} | dict(feeds)
        for node in self._part.fx.nodes:
            if node.op == "get_attr" or node in self._repeated:
                copies[node] = _like(self._fx.node_copy(node, lambda n: copies[n]), node)
                copies[node].meta[MICROBATCH] = index
        for name, value in self._part.updates.items():
            if self._part.node(value) in self._repeated:
                self._values[name] = copies[self._part.node(value)]
        self._copies.append(copies)

    def _update(self, variables: Mapping[Node, Node]) -> dict[Node, Node]:
        """The nodes that stand once. They read the variables as they were before the step."""
        copies = self._copies[0] | dict(variables)
        for node in self._read_by_update():
            if node in self._varying:
                copies[node] = self._combined(node)
        for node in self._part.nodes:
            if node not in self._repeated:
                copies[node] = _like(self._fx.node_copy(node, lambda n: copies[n]), node)
        return copies

    def _combined(self, node: Node) -> Node:
        """The gradient (or whatever else the update reads) of the whole batch."""
        value = node.meta["val"]
        if not value.is_floating_point():
            raise SettingError(
                f"microbatches={self._count}: the update reads {node.name!r} ({TensorSpec.of(value)}), which is no "
                "gradient, and it is not known how its values for the parts go together."
            )
        return self._sums[node] if self._reduction == "sum" else self._mean(node)

    def _fetch(self, name: str, once: Mapping[Node, Node]) -> Node:
        node = self._part.node(self._part.fetches[name])
        if node not in self._varying or node not in self._repeated:
            return once[node]
        whole, part = (
            TensorSpec.of(self._whole.node(self._whole.fetches[name]).meta["val"]),
            TensorSpec.of(node.meta["val"]),
        )
        if whole.shape == part.shape and (not part.shape or info(node).phase is Phase.BACKWARD):
            if part.dtype.is_floating_point and self._reduction == "mean":
                return self._mean(node)
            return self._sums[node]
        if whole.shape == (self._count * part.shape[0], *part.shape[1:]):
            parts = [copies[node] for copies in self._copies]
            joined = self._fx.call_function(aten.cat.default, (parts,))
            return _made(joined, node, torch.cat([p.meta["val"] for p in parts]))
        raise SettingError(
            f"microbatches={self._count}: the fetch {name!r} is {whole} for the batch and {part} for a part of it; "
            "only scalars, gradients and what has the batch as its first axis can be put together."
        )

    def _add(self, node: Node, value: Node) -> None:
        before = self._sums.get(node)
        self._sums[node] = value
        if before is not None:
            product = value.target is aten.mm.default and value.meta["val"].is_floating_point() and not value.users
            with self._fx.inserting_after(value):  # so that neither the value nor what it is made of is kept
                if product:  # one operator adds the product to the sum
                    total = self._fx.call_function(aten.addmm.default, (before, *value.args))
                else:
                    total = self._fx.call_function(aten.add.Tensor, (before, value))
            self._sums[node] = _made(total, node, node.meta["val"])
            total.meta[MICROBATCH] = value.meta[MICROBATCH]

    def _mean(self, node: Node) -> Node:
        scaled = self._fx.call_function(aten.mul.Tensor, (self._sums[node], 1.0 / self._count))
        scaled = _made(scaled, node, node.meta["val"])
        scaled.meta[MICROBATCH] = self._sums[node].meta[MICROBATCH]  # the last: no device waits longer for the first
        return scaled

    def _input(self, node: Node, name: str = "") -> Node:
        return _like(self._fx.placeholder(name or node.name), node)


def _like(node: Node, source: Node) -> Node:
    node.meta = dict(source.meta)
    return node


def _made(node: Node, source: Node, value: Tensor) -> Node:
    """A node that this pass adds, from where `source` is."""
    node.meta = {"val": value, INFO: info(source)}
    return node
