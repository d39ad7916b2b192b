"""LSTM layers in chunks of time: each chunk is a layer over fewer steps, which begins where the one before it ended.

In the backward pass a chunk gets the gradients of its last state from the chunk after it, and the gradients of the
weights are added up as the chunks come (Werbos, "Backpropagation through time: what it does and how to do it", 1990).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from millrace.graph.passes.chunking.builder import ChunkBuilder
from millrace.graph.passes.splitting.builder import arguments, shape_of
from millrace.graph.passes.splitting.values import Along, Several, Split, Value, even

aten = torch.ops.aten

_Y, _H, _C, _WORKSPACE = range(4)  # results of a layer
_WEIGHTS = 4  # of a layer; the backward node's results are: the gradients of its input, weights, h and c


def layer(builder: ChunkBuilder, node: Node) -> Value:
    """One direction of one layer; None where it has fewer steps than there are chunks."""
    x, *weights, h, c, reverse = arguments(node)
    steps = shape_of(x)[0]
    if steps < builder.parts:
        return None
    along = even(steps, builder.parts, 0)
    inputs, state = _inputs(builder, x, along), (builder.whole(h), builder.whole(c))
    values = [builder.whole(weight) for weight in weights]
    made: dict[int, Node] = {}
    for k in _order(builder, reverse):
        made[k] = builder.call(node.target, (inputs[k], *values, *state, reverse), block=k)
        state = (builder.pick(made[k], _H, k), builder.pick(made[k], _C, k))
    chunks = builder.layers[node] = builder.each(made.__getitem__)
    outputs = builder.each(lambda k: builder.pick(chunks[k], _Y, k))
    # As one, so that it is no more than the name of what the backward node asks each chunk for.
    workspaces = builder.each(lambda k: builder.pick(chunks[k], _WORKSPACE, k))
    ends = [0]
    for workspace in workspaces:
        ends.append(ends[-1] + shape_of(workspace)[0])
    return Several((Split(along, outputs), *state, Split(Along(0, tuple(ends)), workspaces)))


def layer_backward(builder: ChunkBuilder, node: Node) -> Value:
    """Its gradients, chunk after chunk the other way round."""
    x, weights, h, c, outputs, gradients, reverse = arguments(node)
    forward: Any = outputs[0].args[0] if outputs[0].target is operator.getitem else None
    chunks = builder.layers.get(forward)
    if chunks is None or any(o.args != (forward, index) for index, o in enumerate(outputs)):
        return None
    along = even(shape_of(x)[0], builder.parts, 0)
    inputs, outer = _inputs(builder, x, along), builder.blocks(gradients[0], along)
    values = [builder.whole(weight) for weight in weights]
    order = _order(builder, reverse)
    before = dict(zip(order[1:], order, strict=False))
    state = [builder.whole(gradient) for gradient in gradients[1:]]
    totals: list[Node] = []
    made: dict[int, Node] = {}
    for k in reversed(order):
        first = [builder.whole(h), builder.whole(c)]
        start = [builder.pick(chunks[before[k]], i, k) for i in (_H, _C)] if k in before else first
        results = [builder.pick(chunks[k], i, k) for i in (_Y, _H, _C, _WORKSPACE)]
        args = (inputs[k], values, *start, results, [outer[k], *state], reverse)
        made[k] = builder.call(node.target, args, block=k)
        found = [builder.pick(made[k], i, k) for i in range(1, _WEIGHTS + 1)]
        totals = (
            [builder.call(aten.add.Tensor, (one, other), block=k) for one, other in zip(totals, found, strict=True)]
            if totals
            else found
        )
        state = [builder.pick(made[k], i, k) for i in (_WEIGHTS + 1, _WEIGHTS + 2)]
    return Several((Split(along, builder.each(lambda k: builder.pick(made[k], 0, k))), *totals, *state))


def _order(builder: ChunkBuilder, reverse: bool) -> list[int]:
    """The chunks in the order in which they are computed."""
    chunks = list(range(builder.parts))
    return chunks[::-1] if reverse else chunks


def _inputs(builder: ChunkBuilder, x: Node, along: Along) -> tuple[Node, ...]:
    """The input in blocks without gaps in memory, as the kernel wants it."""

    def whole(k: int) -> Node:
        block = blocks[k]
        if block.meta["val"].is_contiguous():
            return block
        return builder.call(aten.clone.default, (block,), {"memory_format": torch.contiguous_format}, block=k)

    blocks = builder.blocks(x, along)
    return builder.each(whole)


# By the names of operators, which the rooms that trace register.
RULES = {"millrace.lstm_layer.default": layer, "millrace.lstm_layer_backward.default": layer_backward}
