"""Operators that work element by element, with broadcasting."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from millrace.graph.passes.splitting.builder import Builder, shape_of, tensors_in
from millrace.graph.passes.splitting.values import Along, Layout, Split, Value

aten = torch.ops.aten

# Those that torch does not tag as such.
_UNTAGGED = {
    aten._to_copy.default,
    aten.copy.default,
    aten.full_like.default,
    aten.ones_like.default,
    aten.zeros_like.default,
    aten.empty_like.default,
    aten.leaky_relu_backward.default,
    aten.elu_backward.default,
    aten.hardtanh_backward.default,
}


def is_elementwise(target: Any) -> bool:
    """Whether every element of the result depends on the elements in its place alone."""
    if not isinstance(target, OpOverload):
        return False
    random = torch.Tag.nondeterministic_seeded in target.tags
    return target in _UNTAGGED or (torch.Tag.pointwise in target.tags and not random)


def elementwise(builder: Builder, node: Node) -> Value:
    """Blocks where an operand has them, in the layout that moves the fewest bytes."""
    operands = tensors_in((node.args, node.kwargs))
    shape = shape_of(node)
    wished = node in builder.wishes
    if wished and builder.wishes[node] is None:
        return None
    candidates: dict[Along, None] = {}
    for operand in operands:
        value = builder.value(operand)
        if isinstance(value, Split):
            candidates[value.along.moved(value.along.dim + len(shape) - len(shape_of(operand)))] = None
    wish = builder.wishes.get(node)
    if wish is not None:
        candidates[wish] = None
    if not candidates:
        return None

    def cost(along: Along) -> float:
        return sum(builder.cost(operand, operand_layout(operand, shape, along)) for operand in operands)

    return in_blocks(builder, node, min(candidates, key=cost))


def in_blocks(builder: Builder, node: Node, along: Along) -> Split:
    """The operator on every block, its operands cut where they are as long as the result."""
    operands = tensors_in((node.args, node.kwargs))
    shape = shape_of(node)
    parts = {operand: builder.blocks(operand, operand_layout(operand, shape, along)) for operand in operands}

    def block(k: int) -> Node:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: parts[n][k])
        return builder.call(node.target, args, kwargs, block=k)

    values = [builder.value(operand) for operand in operands]
    weight = len(values) == 1 and isinstance(values[0], Split) and values[0].weight
    return Split(along, builder.each(block), weight)


def operand_layout(operand: Node, shape: tuple[int, ...], along: Along) -> Layout:
    """Where the blocks of a result lie in an operand that is broadcast to it; None where it has one element there."""
    own = shape_of(operand)
    dim = along.dim - len(shape) + len(own)
    return along.moved(dim) if dim >= 0 and own[dim] == shape[along.dim] else None
