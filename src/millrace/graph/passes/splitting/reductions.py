"""Sums, means, largest and smallest values, norms: of every block, or of all blocks from theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from millrace.graph.passes.splitting.builder import Builder, arguments, shape_of
from millrace.graph.passes.splitting.values import Along, Split, Value

aten = torch.ops.aten

# How the blocks' results make the whole one.
_COMBINED = {
    aten.sum.default: aten.add.Tensor,
    aten.sum.dim_IntList: aten.add.Tensor,
    aten.amax.default: aten.maximum.default,
    aten.amin.default: aten.minimum.default,
}
_MEANS = {aten.mean.default: aten.sum.default, aten.mean.dim: aten.sum.dim_IntList}


def reduction(builder: Builder, node: Node) -> Value:
    """A reduction over some or all dimensions."""
    source, *rest = arguments(node)
    value, shape = builder.value(source), shape_of(source)
    dims = _dims(rest, len(shape))
    keeps = bool(rest[1]) if len(rest) > 1 else bool(node.kwargs.get("keepdim", False))
    if not isinstance(value, Split):
        wish = builder.wishes.get(node)
        along = None if wish is None else _before(wish, dims, len(shape), keeps)
        if along is None:
            return None
        value = builder.sliced(builder.whole(source), along)
    along = value.along
    if along.dim not in dims:
        after = along if keeps else along.moved(along.dim - sum(d < along.dim for d in dims))
        return Split(after, _each(builder, node.target, value, node))
    if node.target in _MEANS:
        count = 1
        for dim in dims:
            count *= shape[dim]
        total = builder.total(_each(builder, _MEANS[node.target], value, node))
        return builder.call(aten.div.Tensor, (total, count))
    combined: Any = _COMBINED.get(node.target)  # type: ignore[call-overload]
    return None if combined is None else builder.total(_each(builder, node.target, value, node), combined)


def norm(builder: Builder, node: Node) -> Value:
    """A vector norm over everything: the norm of the blocks' norms."""
    source, *rest = arguments(node)
    value = builder.value(source)
    order = rest[0] if rest else 2
    if not isinstance(value, Split) or shape_of(node) or order == 0 or node.kwargs or len(rest) > 1:
        return None
    norms = builder.each(lambda k: builder.call(node.target, (value.blocks[k], order), block=k))
    stacked = builder.call(aten.stack.default, (list(norms),))
    return builder.call(node.target, (stacked, order))


def _each(builder: Builder, target: Any, value: Split, node: Node) -> tuple[Node, ...]:
    return builder.each(lambda k: builder.call(target, (value.blocks[k], *node.args[1:]), node.kwargs, block=k))


def _dims(rest: list[Any], rank: int) -> list[int]:
    """The dimensions that are reduced; none named means all."""
    named = rest[0] if rest else None
    if named is None or (isinstance(named, list | tuple) and not named):
        return list(range(rank))
    return [int(d) % rank for d in (named if isinstance(named, list | tuple) else [named])]


def _before(wish: Along, dims: list[int], rank: int, keeps: bool) -> Along | None:
    """Where blocks of the result lie in what is reduced."""
    if keeps:
        return wish if wish.dim not in dims else None
    left = [d for d in range(rank) if d not in dims]
    return wish.moved(left[wish.dim]) if wish.dim < len(left) else None


RULES: dict[Any, Any] = {
    **dict.fromkeys([*_COMBINED, *_MEANS], reduction),
    aten.linalg_vector_norm.default: norm,
}
