"""Lookups in a table whose rows are divided, and classification over classes that are.

A block looks up what it holds and gives zeros for the rest; the blocks' results are added. The logits of a softmax
layer stay in blocks as well: what they need of each other are one maximum and one sum per example (Shoeybi et al.,
"Megatron-LM", 2019, §3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from millrace.graph.checked_index import checked_index
from millrace.graph.passes.splitting.builder import Builder, arguments, shape_of
from millrace.graph.passes.splitting.values import Along, Several, Split, Value

aten = torch.ops.aten
_MEAN, _SUM = 1, 2  # reductions of the losses
_NOTHING = -1  # as a padding row


def embedding(builder: Builder, node: Node) -> Value:
    """By rows, or by columns."""
    table, index = arguments(node)[:2]
    value = builder.value(table)
    if not isinstance(value, Split):
        return None
    rest, rank = node.args[3:], len(shape_of(node))
    if value.along.dim == 1:
        whole = builder.whole(index)
        blocks = builder.each(lambda k: builder.call(node.target, (value.blocks[k], whole, _NOTHING, *rest), block=k))
        return Split(value.along.moved(rank - 1), blocks)
    checked = _checked(builder, index, value.along.bounds[-1])

    def block(k: int) -> Node:
        inside, local = _local(builder, checked, value.along, k)
        rows = builder.call(aten.embedding.default, (value.blocks[k], local, _NOTHING, *rest), block=k)
        mask = builder.call(aten.unsqueeze.default, (inside, -1), block=k)
        return _where(builder, mask, rows, k)

    return builder.total(builder.each(block))


def embedding_backward(builder: Builder, node: Node) -> Value:
    """The gradient of a table that is divided by rows, or of columns where the gradient from above is."""
    outer, index, rows, padding, by_frequency = arguments(node)
    value, wish, rank = builder.value(outer), builder.wishes.get(node), len(shape_of(outer))
    if isinstance(value, Split) and value.along.dim == rank - 1 and (wish is None or wish.dim == 1):
        whole = builder.whole(index)
        rest = (whole, rows, padding, by_frequency)
        blocks = builder.each(lambda k: builder.call(node.target, (value.blocks[k], *rest), block=k))
        return Split(value.along.moved(1), blocks)
    if wish is None or wish.dim != 0 or by_frequency:  # a block sees indices that are not its own as row 0
        return None
    gradient, checked, sizes = builder.whole(outer), builder.whole(index), wish.sizes()

    def block(k: int) -> Node:
        inside, local = _local(builder, checked, wish, k)
        mask = builder.call(aten.unsqueeze.default, (inside, -1), block=k)
        own = _where(builder, mask, gradient, k)
        start, stop = wish.bounds[k], wish.bounds[k + 1]
        skipped = padding - start if start <= padding < stop else _NOTHING
        return builder.call(node.target, (own, local, sizes[k], skipped, False), block=k)

    return Split(wish, builder.each(block))


def softmax(builder: Builder, node: Node) -> Value:
    """`_softmax` and `_log_softmax`, also over the dimension that is divided."""
    source, dim, to_float = arguments(node)
    value = builder.value(source)
    if not isinstance(value, Split) or to_float:
        return None
    dim %= len(shape_of(node))
    if value.along.dim != dim:
        blocks = builder.each(lambda k: builder.call(node.target, (value.blocks[k], dim, False), block=k))
        return Split(value.along, blocks)
    highest = builder.total(
        builder.each(lambda k: builder.call(aten.amax.default, (value.blocks[k], [dim], True), block=k)),
        aten.maximum.default,
    )
    shifted = builder.each(lambda k: builder.call(aten.sub.Tensor, (value.blocks[k], highest), block=k))
    powers = builder.each(lambda k: builder.call(aten.exp.default, (shifted[k],), block=k))
    total = _sum_of_blocks(builder, powers, dim)
    if node.target is aten._softmax.default:
        return Split(value.along, builder.each(lambda k: builder.call(aten.div.Tensor, (powers[k], total), block=k)))
    logarithm = builder.call(aten.log.default, (total,))
    return Split(value.along, builder.each(lambda k: builder.call(aten.sub.Tensor, (shifted[k], logarithm), block=k)))


def safe_softmax(builder: Builder, node: Node) -> Value:
    """The softmax of attention, where another dimension is divided."""
    source, dim, *rest = arguments(node)
    value = builder.value(source)
    if not isinstance(value, Split) or value.along.dim == dim % len(shape_of(node)):
        return None
    blocks = builder.each(lambda k: builder.call(node.target, (value.blocks[k], dim, *rest), node.kwargs, block=k))
    return Split(value.along, blocks)


def softmax_backward(builder: Builder, node: Node) -> Value:
    """Their gradients, where the result of the softmax is in blocks."""
    outer, result, dim, dtype = arguments(node)
    value = builder.value(result)
    if not isinstance(value, Split) or dtype != node.meta["val"].dtype or dtype != outer.meta["val"].dtype:
        return None
    dim %= len(shape_of(node))
    gradients = builder.blocks(outer, value.along)
    if value.along.dim != dim:
        rest = (dim, dtype)
        blocks = builder.each(lambda k: builder.call(node.target, (gradients[k], value.blocks[k], *rest), block=k))
        return Split(value.along, blocks)

    def call(target: Any, one: Any, other: Any, k: int) -> Node:
        return builder.call(target, (one, other), block=k)

    if node.target is aten._softmax_backward_data.default:
        scaled = builder.each(lambda k: call(aten.mul.Tensor, gradients[k], value.blocks[k], k))
        total = _sum_of_blocks(builder, scaled, dim)
        taken = builder.each(lambda k: call(aten.mul.Tensor, value.blocks[k], total, k))
        return Split(value.along, builder.each(lambda k: call(aten.sub.Tensor, scaled[k], taken[k], k)))
    total = _sum_of_blocks(builder, gradients, dim)
    shares = builder.each(lambda k: builder.call(aten.exp.default, (value.blocks[k],), block=k))
    taken = builder.each(lambda k: call(aten.mul.Tensor, shares[k], total, k))
    return Split(value.along, builder.each(lambda k: call(aten.sub.Tensor, gradients[k], taken[k], k)))


def nll_loss(builder: Builder, node: Node) -> Value:
    """The loss over divided classes: each block picks the scores of the labels that it holds."""
    scores, target, weights, reduction, ignored = arguments(node)
    value = builder.value(scores)
    if not isinstance(value, Split) or value.along.dim != 1 or len(shape_of(scores)) != 2 or weights is not None:
        return None
    labels = _checked(builder, target, value.along.bounds[-1], ignored)

    def picked(k: int) -> Node:
        inside, local = _local(builder, labels, value.along, k)
        column = builder.call(aten.unsqueeze.default, (local, 1), block=k)
        found = builder.call(aten.gather.default, (value.blocks[k], 1, column), block=k)
        return _where(builder, inside, builder.call(aten.squeeze.dims, (found, [1]), block=k), k)

    losses = builder.call(aten.neg.default, (builder.total(builder.each(picked)),))
    counted = builder.call(aten.ne.Scalar, (labels, ignored))
    zero = builder.call(aten.zeros_like.default, (losses,))
    losses = builder.call(aten.where.self, (counted, losses, zero))
    count = builder.call(aten._to_copy.default, (counted,), {"dtype": losses.meta["val"].dtype})
    number = builder.call(aten.sum.default, (count,))
    if reduction in (_MEAN, _SUM):
        losses = builder.call(aten.sum.default, (losses,))
    if reduction == _MEAN:
        losses = builder.call(aten.div.Tensor, (losses, number))
    return Several((losses, number))


def nll_loss_backward(builder: Builder, node: Node) -> Value:
    """Its gradient: in the column of the label, where the block holds it, and zero elsewhere."""
    outer, scores, target, weights, reduction, ignored, number = arguments(node)
    value = builder.value(scores)
    if not isinstance(value, Split) or value.along.dim != 1 or len(shape_of(scores)) != 2 or weights is not None:
        return None
    labels, slope = builder.whole(target), builder.call(aten.neg.default, (builder.whole(outer),))
    if reduction == _MEAN:
        assert isinstance(number, Node)
        slope = builder.call(aten.div.Tensor, (slope, builder.whole(number)))
    counted = builder.call(aten.ne.Scalar, (labels, ignored))
    zero = builder.call(aten.zeros_like.default, (slope,))
    slopes = builder.call(aten.where.self, (counted, slope, zero))
    rows = builder.call(aten.unsqueeze.default, (slopes, 1))
    column = builder.call(aten.unsqueeze.default, (labels, 1))
    ends, device = value.along.bounds, labels.meta["val"].device

    def block(k: int) -> Node:
        own = builder.call(aten.arange.start, (ends[k], ends[k + 1]), {"device": device}, block=k)
        here = builder.call(aten.eq.Tensor, (column, own), block=k)
        return _where(builder, here, rows, k)

    return Split(value.along, builder.each(block))


def _checked(builder: Builder, index: Node, extent: int, ignored: int | None = None) -> Node:
    """The indices, which the whole table would have refused where they are out of its range."""
    return builder.call(checked_index, (builder.whole(index), 0, extent - 1, ignored))


def _local(builder: Builder, index: Node, along: Along, k: int) -> tuple[Node, Node]:
    """Which indices are in block k, and their places there; 0 for the others."""
    above = builder.call(aten.ge.Scalar, (index, along.bounds[k]), block=k)
    below = builder.call(aten.lt.Scalar, (index, along.bounds[k + 1]), block=k)
    inside = builder.call(aten.logical_and.default, (above, below), block=k)
    place = builder.call(aten.sub.Tensor, (index, along.bounds[k]), block=k)
    return inside, _where(builder, inside, place, k)


def _where(builder: Builder, mask: Node, value: Node, k: int) -> Node:
    zero = builder.call(aten.full.default, ([], 0), _settings(value), block=k)
    return builder.call(aten.where.self, (mask, value, zero), block=k)


def _settings(node: Node) -> dict[str, Any]:
    value = node.meta["val"]
    return {"dtype": value.dtype, "device": value.device}


def _sum_of_blocks(builder: Builder, blocks: tuple[Node, ...], dim: int) -> Node:
    return builder.total(builder.each(lambda k: builder.call(aten.sum.dim_IntList, (blocks[k], [dim], True), block=k)))


RULES: dict[Any, Any] = {
    aten.embedding.default: embedding,
    aten.embedding_dense_backward.default: embedding_backward,
    aten._softmax.default: softmax,
    aten._log_softmax.default: softmax,
    aten._safe_softmax.default: safe_softmax,
    aten._softmax_backward_data.default: softmax_backward,
    aten._log_softmax_backward_data.default: softmax_backward,
    aten.nll_loss_forward.default: nll_loss,
    aten.nll_loss_backward.default: nll_loss_backward,
}
