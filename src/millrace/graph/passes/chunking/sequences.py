"""Operators between recurrent layers: sequences made of steps and taken apart, norms, losses."""

from __future__ import annotations

import bisect
from typing import Any

import torch
from torch.fx import Node

from millrace.graph.passes.chunking.builder import CHUNK, ChunkBuilder
from millrace.graph.passes.splitting.builder import arguments, several, shape_of
from millrace.graph.passes.splitting.values import Several, Split, Value, even
from millrace.graph.passes.splitting.views import picked

aten = torch.ops.aten
_MEAN, _SUM = 1, 2  # reductions of a loss


def stack(builder: ChunkBuilder, node: Node) -> Value:
    """Steps of an unrolled recurrence that become a sequence: those of each chunk by themselves."""
    items = [builder.whole(item) for item in arguments(node)[0]]
    chunks = [item.meta.get(CHUNK, -1) for item in items]
    along = even(len(items), builder.parts, _dim(node, len(shape_of(node))))
    in_time = [bisect.bisect_right(along.bounds, step) - 1 for step in range(len(items))]
    if len(items) < builder.parts or chunks not in (in_time, in_time[::-1]):
        return None
    parts = [items[start:stop] for start, stop in zip(along.bounds, along.bounds[1:], strict=False)]
    return Split(along, builder.each(lambda k: builder.call(node.target, (parts[k], along.dim), block=k)))


def unbind(builder: ChunkBuilder, node: Node) -> Value:
    """A sequence taken apart into its steps, each from its chunk."""
    value, dim = builder.value(arguments(node)[0]), _dim(node, len(shape_of(arguments(node)[0])))
    if not isinstance(value, Split) or value.along.dim != dim:
        return None
    blocks = builder.each(lambda k: builder.call(node.target, (value.blocks[k], dim), block=k))
    sizes = value.along.sizes()
    return Several(tuple(builder.pick(blocks[k], i, k) for k, size in enumerate(sizes) for i in range(size)))


def select(builder: ChunkBuilder, node: Node) -> Value:
    """One step of a sequence, from its chunk."""
    source, dim, index = arguments(node)
    value, length = builder.value(source), shape_of(source)
    if not isinstance(value, Split) or value.along.dim != dim % len(length):
        return picked(builder, node)
    step = index % length[value.along.dim]
    k = bisect.bisect_right(value.along.bounds, step) - 1
    return builder.call(node.target, (value.blocks[k], dim, step - value.along.bounds[k]), block=k)


def layer_norm(builder: ChunkBuilder, node: Node) -> Value:
    """Norms over what comes after time."""
    source, shape, weight, bias, epsilon = arguments(node)
    value = builder.value(source)
    if not isinstance(value, Split) or value.along.dim >= len(shape_of(source)) - len(shape):
        return None
    rest = (shape, *_whole(builder, [weight, bias]), epsilon)
    return several(
        builder.each(lambda k: builder.call(node.target, (value.blocks[k], *rest), block=k)),
        builder,
        [value.along] * 3,
    )


def layer_norm_backward(builder: ChunkBuilder, node: Node) -> Value:
    """Their gradients; those of weight and bias are added up over the chunks."""
    outer, source, shape, mean, deviation, weight, bias, mask = arguments(node)
    value = builder.value(source)
    if not isinstance(value, Split) or value.along.dim >= len(shape_of(source)) - len(shape):
        return None
    parts = [builder.blocks(argument, value.along) for argument in (outer, source, mean, deviation)]
    rest = _whole(builder, [weight, bias])

    def block(k: int) -> Node:
        gradient, own, *statistics = (part[k] for part in parts)
        return builder.call(node.target, (gradient, own, shape, *statistics, *rest, mask), block=k)

    kept: list[Any] = [value.along, "sum", "sum"]
    return several(builder.each(block), builder, [k if m else "none" for k, m in zip(kept, mask, strict=True)])


def nll_loss(builder: ChunkBuilder, node: Node) -> Value:
    """The loss of each chunk, summed up."""
    scores, target, weight, reduction, ignored = arguments(node)
    value = builder.value(scores)
    if not _by_rows(value, scores, weight, reduction):
        return None
    assert isinstance(value, Split)
    labels = builder.blocks(target, value.along)
    rest = (None, _SUM, ignored)
    chunks = builder.each(lambda k: builder.call(node.target, (value.blocks[k], labels[k], *rest), block=k))
    loss, number = (builder.total(builder.each(lambda k, i=i: builder.pick(chunks[k], i, k))) for i in (0, 1))  # type: ignore[misc]
    if reduction == _MEAN:
        loss = builder.call(aten.div.Tensor, (loss, number))
    return Several((loss, number))


def nll_loss_backward(builder: ChunkBuilder, node: Node) -> Value:
    """Its gradient in each chunk."""
    outer, scores, target, weight, reduction, ignored, number = arguments(node)
    value = builder.value(scores)
    if not _by_rows(value, scores, weight, reduction):
        return None
    assert isinstance(value, Split)
    slope, count = builder.whole(outer), builder.whole(number)
    if reduction == _MEAN:
        slope = builder.call(aten.div.Tensor, (slope, count))
    labels = builder.blocks(target, value.along)

    def block(k: int) -> Node:
        return builder.call(node.target, (slope, value.blocks[k], labels[k], None, _SUM, ignored, count), block=k)

    return Split(value.along, builder.each(block))


def _by_rows(value: Value, scores: Node, weight: Any, reduction: Any) -> bool:
    rows = isinstance(value, Split) and value.along.dim == 0 and len(shape_of(scores)) == 2
    return rows and weight is None and reduction in (_MEAN, _SUM)


def _dim(node: Node, rank: int) -> int:
    """The dimension that the second argument names; 0 where it is left out."""
    return int(node.args[1] if len(node.args) > 1 else 0) % rank  # type: ignore[arg-type]


def _whole(builder: ChunkBuilder, nodes: list[Any]) -> list[Any]:
    return [builder.whole(node) if isinstance(node, Node) else node for node in nodes]


RULES: dict[str, Any] = {
    str(operator): rule
    for operator, rule in {
        aten.stack.default: stack,
        aten.unbind.int: unbind,
        aten.select.int: select,
        aten.native_layer_norm.default: layer_norm,
        aten.native_layer_norm_backward.default: layer_norm_backward,
        aten.nll_loss_forward.default: nll_loss,
        aten.nll_loss_backward.default: nll_loss_backward,
    }.items()
}
