"""The split graph while it is made: its nodes, and values brought into the layouts that operators need."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node

from millrace.graph.graph import INFO, Graph, NodeInfo, info
from millrace.graph.passes.splitting.layouts import PERMUTATIONS, RESHAPES, before_permutation
from millrace.graph.passes.splitting.values import Along, Layout, Several, Split, Value

aten = torch.ops.aten
# What refuses other strides than it was traced with, or gives other values. (The gradient of that loss lies as the
# scores do, and has to be contiguous.)
_READ_STRIDES = (aten.as_strided.default, aten.nll_loss2d_backward.default)
TRAVELS_NEVER = 1e30  # the cost of joining a weight: above every other


class Builder:
    """Makes nodes of the split graph.

    values: what each node of the whole graph has become. wishes: the layout in which the variables' updates want the
    value of a node (None: whole); nodes that are not in it are wanted in no particular one. rename: the owner that an
    update node names, for a block of it (None: no block).
    """

    word = "block"  # what a part of a value is called in the names of nodes

    def __init__(
        self, parts: int, mode: Any, wishes: dict[Node, Layout], rename: Callable[[str, int | None], str]
    ) -> None:
        self.fx = torch.fx.Graph()
        self.parts = parts
        self.values: dict[Node, Value] = {}
        self.wishes = wishes
        self.slices: dict[tuple[Node, Along], Split] = {}
        self._mode = mode
        self._rename = rename
        self._info = NodeInfo()  # of the node that is being rewritten
        self._name = ""
        self._joined: dict[Split, Node] = {}
        self._cuts: dict[Node, list[Along]] = {}

    # -- nodes ---------------------------------------------------------------------------------------------------

    def begin(self, node: Node) -> None:
        """What is made from here on is made for `node` of the whole graph."""
        self._info, self._name = info(node), node.name

    def call(self, target: Any, args: Sequence[Any], kwargs: Any = None, *, block: int | None = None) -> Node:
        """A node that calls `target`; its value is found by running it on fake tensors."""
        args, kwargs = tuple(args), dict(kwargs or {})
        target, value = self._run(target, args, kwargs)
        name = self._name if block is None else f"{self._name}_{self.word}{block}"
        node = self.fx.create_node("call_function", target, args, kwargs, name=name)
        node.meta = {"val": value, **self._origin(self._info, block)}
        return node

    def _origin(self, whole: NodeInfo, block: int | None) -> dict[str, Any]:
        """What the `meta` of a node says of where it comes from. whole: the origin of the node that it stands for."""
        return {INFO: replace(whole, block=block, variable=self._rename(whole.variable, block))}

    def each(self, make: Callable[[int], Node]) -> tuple[Node, ...]:
        """One node per block."""
        return tuple(make(block) for block in range(self.parts))

    def total(self, blocks: Iterable[Node], target: Any = aten.add.Tensor) -> Node:
        """The partial results of all blocks put together by an operator of two arguments."""
        first, *rest = blocks
        for block in rest:
            first = self.call(target, (first, block))
        return first

    def copy(self, node: Node) -> Node:
        """`node` as it is, on whole values."""
        changed = False

        def whole(argument: Node) -> Node:
            nonlocal changed
            new = self.layout_of(self.whole(argument), argument)
            changed |= new.meta.get("val") is not argument.meta.get("val")
            return new

        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), whole)
        new = self.fx.create_node(node.op, node.target, args, kwargs, name=node.name)
        new.meta = dict(node.meta)
        if changed and isinstance(node.target, OpOverload):
            new.target, new.meta["val"] = self._run(node.target, args, kwargs)
        if INFO in new.meta:
            new.meta[INFO] = replace(info(node), variable=self._rename(info(node).variable, None))
        return new

    def constant(self, node: Node, held: object) -> Node:
        """A node that reads a constant of the module, which is whole. held: the constant."""
        new = self.fx.create_node(node.op, node.target, (), {}, name=node.name)
        new.meta = dict(node.meta)
        if isinstance(held, Tensor) and "val" not in new.meta:
            node.meta["val"] = new.meta["val"] = self._mode.from_tensor(held)
        return new

    def layout_of(self, new: Node, old: Node) -> Node:
        """`new`, copied where an operator reads strides and they are no longer those of `old`."""
        a, b = new.meta.get("val"), old.meta.get("val")
        reads_strides = any(user.target in _READ_STRIDES for user in old.users)
        if not reads_strides or not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.stride() == b.stride():
            return new
        settings = {"dtype": b.dtype, "device": b.device}
        memory = self.call(aten.empty_strided.default, (list(b.shape), list(b.stride())), settings)
        return self.call(aten.copy.default, (memory, new))

    def _run(self, target: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        fakes = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self._mode, torch.no_grad():
            try:
                return target, target(*fakes[0], **fakes[1])
            except (RuntimeError, ValueError):
                if target not in RESHAPES:
                    raise
                # Blocks lie differently in memory than the whole: what was a view there may need a copy here.
                return aten.reshape.default, aten.reshape.default(*fakes[0])

    # -- layouts -------------------------------------------------------------------------------------------------

    def value(self, node: Node) -> Value:
        """What a node of the whole graph has become."""
        return self.values[node]

    def whole(self, node: Node) -> Node:
        """Its value in one piece."""
        value = self.values[node]
        return self.join(value, info(node)) if isinstance(value, Split) else _node(value)

    def join(self, value: Split, origin: NodeInfo | None = None) -> Node:
        """Blocks put side by side; only once for each value. It belongs where they were made."""
        if value not in self._joined:
            before = self._info, self._name
            self._info = origin or self._info
            self._name = value.blocks[0].name.removesuffix(f"_{self.word}0") + "_joined"
            self._joined[value] = self.call(aten.cat.default, (list(value.blocks), value.along.dim))
            self._info, self._name = before
        return self._joined[value]

    def layouts(self, node: Node) -> list[Along]:
        """The blocks in which the value is to be had at no cost: its own, or those that it has been cut into."""
        value = self.values[node]
        if isinstance(value, Split):
            return [value.along]
        return list(self._cuts.get(value, [])) if isinstance(value, Node) else []

    def in_layout(self, node: Node, layout: Layout) -> Value:
        """The value of a node of the whole graph, whole or as these blocks."""
        value = self.values[node]
        if layout is None:
            return self.whole(node)
        if isinstance(value, Split):
            return value if value.along == layout else self.sliced(self.whole(node), layout)
        return self.sliced(_node(value), layout)

    def blocks(self, node: Node, layout: Layout) -> tuple[Node, ...]:
        """One node per block: the same one for all where the layout is whole."""
        value = self.in_layout(node, layout)
        return value.blocks if isinstance(value, Split) else (_node(value),) * self.parts

    def sliced(self, node: Node, along: Along) -> Split:
        """A whole value cut into blocks; only once for each. Of a transposed one the original is cut."""
        key = (node, along)
        if key not in self.slices:
            source = node.args[0] if node.target in PERMUTATIONS and node.args else None
            if isinstance(source, Node):
                cut = self.sliced(source, before_permutation(node, along))
                made = self.each(lambda k: self.call(node.target, (cut.blocks[k], *node.args[1:]), block=k))
            else:
                before, self._name = self._name, node.name
                ends = along.bounds
                made = self.each(
                    lambda k: self.call(aten.slice.Tensor, (node, along.dim, ends[k], ends[k + 1]), block=k)
                )
                self._name = before
            self.slices[key] = Split(along, made)
            self._cuts.setdefault(node, []).append(along)
        return self.slices[key]

    def cost(self, node: Node, layout: Layout) -> float:
        """Bytes that move when the value is brought into the layout; nothing where it has been before."""
        value = self.values[node]
        size = size_bytes(node)
        if isinstance(value, Split):
            if value.along == layout:
                return 0.0
            if value in self._joined:
                return 0.0 if layout is None else size
            return TRAVELS_NEVER if value.weight else size
        if layout is None or (_node(value), layout) in self.slices:
            return 0.0
        return size


def fake_mode(graph: Graph) -> Any:
    """The mode of the fake tensors that stand for the graph's values."""
    for node in graph.fx.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode
    return FakeTensorMode()


def fits(value: Value, expected: Any) -> bool:
    """Whether the blocks make up a value of the shape and dtype that the whole has; a rule may not know every case."""
    if isinstance(value, Several):
        return all(v is None or fits(v, e) for v, e in zip(value.values, expected, strict=True))
    if not isinstance(expected, Tensor):
        return False
    if isinstance(value, Split):
        shape = list(expected.shape)
        sizes = value.along.sizes()
        if sum(sizes) != shape[value.along.dim]:
            return False
        shapes = [(*shape[: value.along.dim], size, *shape[value.along.dim + 1 :]) for size in sizes]
        found = [block.meta["val"] for block in value.blocks]
        return all(f.shape == torch.Size(s) and f.dtype == expected.dtype for f, s in zip(found, shapes, strict=True))
    assert isinstance(value, Node)
    return value.meta["val"].shape == expected.shape and value.meta["val"].dtype == expected.dtype


def arguments(node: Node) -> tuple[Any, ...]:
    """The node's arguments, as its operator knows them to be."""
    return node.args


def shape_of(node: Node) -> tuple[int, ...]:
    """The shape of the tensor that a node gives."""
    return tuple(node.meta["val"].shape)


def size_bytes(node: Node) -> float:
    """Bytes of the tensor that a node gives."""
    value = node.meta["val"]
    return float(value.numel() * value.dtype.itemsize)


def tensors_in(arguments: Any) -> list[Node]:
    """The nodes among nested arguments, each once."""
    return list(dict.fromkeys(a for a in pytree.tree_leaves(arguments) if isinstance(a, Node)))


def several(nodes: tuple[Node, ...], builder: Builder, layouts: Sequence[Layout | str]) -> Several:
    """The results of one operator that ran once per block, taken apart.

    Args: layouts: of each result; "sum" adds the blocks' results, "none" leaves the result out.
    """
    found: list[Value] = []
    for index, layout in enumerate(layouts):
        if layout == "none":
            found.append(None)
            continue
        taken = builder.each(lambda k, index=index: builder.call(operator.getitem, (nodes[k], index), block=k))  # type: ignore[misc]
        found.append(builder.total(taken) if layout == "sum" else Split(layout, taken))  # type: ignore[arg-type]
    return Several(tuple(found))


def _node(value: Value) -> Node:
    assert isinstance(value, Node)
    return value
