"""Operators that arrange elements: permutations, reshapes, slices, joins along another dimension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from millrace.graph.passes.splitting.builder import Builder, shape_of, tensors_in
from millrace.graph.passes.splitting.layouts import PERMUTATIONS, RESHAPES, after_permutation, reshaped
from millrace.graph.passes.splitting.values import Along, Split, Value

aten = torch.ops.aten


def permutation(builder: Builder, node: Node) -> Value:
    """Of every block."""
    value = _split(builder, node)
    if value is None:
        return None
    return _of_each(builder, node, value, after_permutation(node, value.along), lambda _: node.args[1:])


def reshape(builder: Builder, node: Node) -> Value:
    """Of every block, where blocks stay blocks."""
    value = _split(builder, node)
    if value is None:
        return None
    shape = shape_of(node)
    along = reshaped(shape_of(_source(node)), shape, value.along)
    if along is None:
        return None
    sizes = along.sizes()
    return _of_each(builder, node, value, along, lambda k: ([*shape[: along.dim], sizes[k], *shape[along.dim + 1 :]],))


def unsqueeze(builder: Builder, node: Node) -> Value:
    """Of every block."""
    value = _split(builder, node)
    if value is None:
        return None
    new = int(node.args[1]) % len(shape_of(node))  # type: ignore[arg-type]
    dim = value.along.dim
    return _of_each(builder, node, value, value.along.moved(dim + (new <= dim)), lambda _: node.args[1:])


def squeeze(builder: Builder, node: Node) -> Value:
    """Of every block. A block of one element keeps its dimension, so the dropped ones are named."""
    value = _split(builder, node)
    if value is None:
        return None
    old = shape_of(_source(node))
    named: Any = node.args[1] if len(node.args) > 1 else list(range(len(old)))
    dims = [int(d) % len(old) for d in (named if isinstance(named, list | tuple) else [named])]
    dropped = [d for d in dims if old[d] == 1]
    along = value.along.moved(value.along.dim - sum(d < value.along.dim for d in dropped))
    blocks = builder.each(lambda k: builder.call(aten.squeeze.dims, (value.blocks[k], dropped), block=k))
    return Split(along, blocks, value.weight)


def expand(builder: Builder, node: Node) -> Value:
    """Of every block, to its own size."""
    value = _split(builder, node)
    if value is None:
        return None
    shape = list(shape_of(node))
    along = value.along.moved(value.along.dim + len(shape) - len(shape_of(_source(node))))
    if shape[along.dim] != along.bounds[-1]:
        return None
    sizes = along.sizes()
    return _of_each(builder, node, value, along, lambda k: ([*shape[: along.dim], sizes[k], *shape[along.dim + 1 :]],))


def picked(builder: Builder, node: Node) -> Value:
    """`slice` and `select` along another dimension, of every block."""
    value = _split(builder, node)
    if value is None:
        return None
    dim = int(node.args[1] if len(node.args) > 1 else 0) % len(shape_of(_source(node)))  # type: ignore[arg-type]
    if dim == value.along.dim:
        return None
    drops = node.target is aten.select.int and dim < value.along.dim
    return _of_each(builder, node, value, value.along.moved(value.along.dim - drops), lambda _: node.args[1:])


def joined(builder: Builder, node: Node) -> Value:
    """`cat` along another dimension than that of the blocks."""
    operands = tensors_in(node.args[0])
    rank = len(shape_of(node))
    dim = int(node.args[1] if len(node.args) > 1 else 0) % rank  # type: ignore[arg-type]
    values = [builder.value(operand) for operand in operands]
    along = next((v.along for v in values if isinstance(v, Split) and v.along.dim != dim), None)
    if along is None or any(len(shape_of(operand)) != rank for operand in operands):
        return None
    parts = {operand: builder.blocks(operand, along) for operand in operands}
    listed: Any = node.args[0]
    blocks = builder.each(lambda k: builder.call(node.target, ([parts[n][k] for n in listed], dim), block=k))
    return Split(along, blocks)


def _source(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _split(builder: Builder, node: Node) -> Split | None:
    value = builder.value(_source(node))
    return value if isinstance(value, Split) else None


def _of_each(builder: Builder, node: Node, value: Split, along: Along, rest: Callable[[int], Any]) -> Split:
    blocks = builder.each(lambda k: builder.call(node.target, (value.blocks[k], *rest(k)), node.kwargs, block=k))
    return Split(along, blocks, value.weight)


RULES = {
    **dict.fromkeys(PERMUTATIONS, permutation),
    **dict.fromkeys(RESHAPES, reshape),
    aten.unsqueeze.default: unsqueeze,
    aten.squeeze.default: squeeze,
    aten.squeeze.dim: squeeze,
    aten.squeeze.dims: squeeze,
    aten.expand.default: expand,
    aten.slice.Tensor: picked,
    aten.select.int: picked,
    aten.cat.default: joined,
}
