"""Matrix products: by rows, by columns, by the dimension that is summed over, or by batch.

Each way asks its two factors for layouts; the one that moves the fewest bytes is taken (Xu et al., "GSPMD: general and
scalable parallelization for ML computation graphs", 2021, propagate layouts so). Joining a split weight counts as
infinitely dear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from millrace.graph.passes.splitting.builder import Builder, arguments, shape_of, size_bytes
from millrace.graph.passes.splitting.elementwise import operand_layout
from millrace.graph.passes.splitting.values import Along, Layout, Split, Value

aten = torch.ops.aten

_PLAIN = {aten.addmm.default: aten.mm.default, aten.baddbmm.default: aten.bmm.default}


@dataclass(frozen=True)
class _Way:
    """One way to compute a product in blocks: the layouts of both factors and of the result."""

    left: Layout
    right: Layout
    result: Layout  # None: whole
    sums: bool = False  # the blocks give partial results that are added


def product(builder: Builder, node: Node) -> Value:
    """`mm`, `bmm`, and with a bias `addmm` and `baddbmm`."""
    bias, left, right = arguments(node) if node.target in _PLAIN else (None, *arguments(node))
    ways = _ways(builder, node, left, right)
    if bias is not None and node.kwargs:  # a weighted sum: the bias would be scaled apart from partial results
        ways = [way for way in ways if not way.sums]

    def cost(way: _Way) -> float:
        moved = builder.cost(left, way.left) + builder.cost(right, way.right)
        if way.sums:
            moved += size_bytes(node)
        if node in builder.wishes and builder.wishes[node] != way.result:
            moved += size_bytes(node)
        return moved

    way = min(ways, key=cost)
    if way.left is None and way.right is None:
        return None
    xs, ys = builder.blocks(left, way.left), builder.blocks(right, way.right)
    if way.sums:
        target: Any = node.target
        plain = _PLAIN.get(target, target)
        total = builder.total(builder.each(lambda k: builder.call(plain, (xs[k], ys[k]), block=k)))
        return total if bias is None else builder.call(aten.add.Tensor, (total, builder.whole(bias)))
    assert way.result is not None
    if bias is None:
        return Split(way.result, builder.each(lambda k: builder.call(node.target, (xs[k], ys[k]), block=k)))
    added = builder.blocks(bias, operand_layout(bias, shape_of(node), way.result))
    blocks = builder.each(lambda k: builder.call(node.target, (added[k], xs[k], ys[k]), node.kwargs, block=k))
    return Split(way.result, blocks)


def _ways(builder: Builder, node: Node, left: Node, right: Node) -> list[_Way]:
    """Every way that the present layouts, or the wish for the result, suggest; as a whole comes last."""
    rank = len(shape_of(node))
    rows, columns = rank - 2, rank - 1
    found: dict[_Way, None] = {}

    def add(along: Along, dim: int | str) -> None:
        if dim == "summed":
            found[_Way(along.moved(columns), along.moved(rows), None, sums=True)] = None
        elif dim == rows:
            found[_Way(along.moved(rows), None, along.moved(rows))] = None
        elif dim == columns:
            found[_Way(None, along.moved(columns), along.moved(columns))] = None
        else:
            found[_Way(along, along, along)] = None

    wish = builder.wishes.get(node)
    if wish is not None:
        add(wish, wish.dim)
    for along in builder.layouts(left):
        add(along, "summed" if along.dim == columns else along.dim)
    for along in builder.layouts(right):
        add(along, "summed" if along.dim == rows else along.dim)
    found[_Way(None, None, None)] = None
    return list(found)


RULES: dict[Any, Any] = dict.fromkeys(
    (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default), product
)
