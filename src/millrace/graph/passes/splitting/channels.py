"""Convolutions by output channels, and operators that treat every channel, or every example, alike."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from millrace.graph.passes.splitting.builder import Builder, arguments, several, shape_of
from millrace.graph.passes.splitting.values import Along, Several, Split, Value

aten = torch.ops.aten
_TRANSPOSED, _GROUPS = 6, 8  # arguments of a convolution


def convolution(builder: Builder, node: Node) -> Value:
    """Each block makes its own channels, from all of the input or from its groups' channels."""
    source, weight, bias, *rest = arguments(node)
    value = builder.value(weight)
    if not isinstance(value, Split) or value.along.dim != 0 or node.args[_TRANSPOSED]:
        return None
    fed = fed_channels(value.along, shape_of(weight), int(node.args[_GROUPS]))  # type: ignore[arg-type]
    if fed is None:
        return None
    channels, groups = fed
    inputs = builder.blocks(source, channels)
    biases = builder.blocks(bias, value.along) if isinstance(bias, Node) else (None,) * builder.parts

    def block(k: int) -> Node:
        args = (inputs[k], value.blocks[k], biases[k], *rest[:-1], groups[k])
        return builder.call(node.target, args, block=k)

    return Split(value.along.moved(1), builder.each(block))


def convolution_backward(builder: Builder, node: Node) -> Value:
    """Gradients of weight and bias stay with their block; those of the input are added, or are of its groups."""
    outer, source, weight, bias_sizes, *rest = arguments(node)
    value = builder.value(weight)
    *rest, groups_arg, mask = rest
    if not isinstance(value, Split) or value.along.dim != 0 or node.args[_TRANSPOSED + 1]:
        return None
    fed = fed_channels(value.along, shape_of(weight), int(groups_arg))
    if fed is None:
        return None
    channels, groups = fed
    gradients, inputs = builder.blocks(outer, value.along.moved(1)), builder.blocks(source, channels)
    sizes = value.along.sizes()

    def block(k: int) -> Node:
        biases = [sizes[k]] if bias_sizes else bias_sizes
        args = (gradients[k], inputs[k], value.blocks[k], biases, *rest, groups[k], mask)
        return builder.call(node.target, args, block=k)

    into = channels if channels is not None else "sum"
    wanted: Any = [into if mask[0] else "none", *(value.along if m else "none" for m in mask[1:])]
    return several(builder.each(block), builder, wanted)


def fed_channels(along: Along, weight: tuple[int, ...], groups: int) -> tuple[Along | None, list[int]] | None:
    """Which input channels each block of output channels reads (None: all of them), and its number of groups.

    None where the blocks would cut through a group.
    """
    if groups == 1:
        return None, [1] * len(along.sizes())
    made = weight[0] // groups  # output channels of one group
    if any(bound % made for bound in along.bounds):
        return None
    ends = [bound // made for bound in along.bounds]
    return Along(1, tuple(end * weight[1] for end in ends)), [b - a for a, b in itertools.pairwise(ends)]


@dataclass(frozen=True)
class _Alike:
    """An operator whose blocks need nothing of each other: at which dimension of each argument and result they lie.

    arguments: position -> dimension. results: dimensions. None stands for the dimension of the first argument itself,
    which may be one of those before the last `inner` ones.
    """

    arguments: dict[int, int | None]
    results: tuple[int | None, ...]
    inner: int = 0
    leading: int = 0  # the argument that decides


_NORM = _Alike({0: 1, 1: 0, 2: 0, 3: 0, 4: 0}, (1, 0, 0, 0, 0))
_NORM_BACKWARD = _Alike({0: 1, 1: 1, 2: 0, 3: 0, 4: 0, 5: 0, 6: 0}, (1, 0, 0), leading=1)
_HEADS: dict[int, int | None] = {0: None, 1: None, 2: None}

_ALIKE: dict[Any, _Alike] = {
    aten._native_batch_norm_legit_functional.default: _NORM,
    aten._native_batch_norm_legit_no_training.default: _Alike(_NORM.arguments, (1, 0, 0)),
    aten._native_batch_norm_legit.no_stats: _Alike({0: 1, 1: 0, 2: 0}, (1, 0, 0)),
    aten.native_batch_norm_backward.default: _NORM_BACKWARD,
    aten.max_pool2d_with_indices.default: _Alike({0: None}, (None, None), inner=2),
    aten.max_pool2d_with_indices_backward.default: _Alike({0: None, 1: None, 7: None}, (None,), inner=2, leading=1),
    aten.avg_pool2d.default: _Alike({0: None}, (None,), inner=2),
    aten.avg_pool2d_backward.default: _Alike({0: None, 1: None}, (None,), inner=2, leading=1),
    aten._adaptive_avg_pool2d.default: _Alike({0: None}, (None,), inner=2),
    aten._adaptive_avg_pool2d_backward.default: _Alike({0: None, 1: None}, (None,), inner=2, leading=1),
    aten._scaled_dot_product_flash_attention_for_cpu.default: _Alike(_HEADS, (None, None), inner=2),
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _Alike(
        dict.fromkeys(range(6)), (None, None, None), inner=2, leading=1
    ),
}


def alike(builder: Builder, node: Node) -> Value:
    """The operator on every block of channels (or heads, or examples)."""
    kind = _ALIKE[node.target]
    deciding = arguments(node)[kind.leading]
    value = builder.value(deciding)
    if not isinstance(value, Split):
        return None
    fixed = kind.arguments[kind.leading]
    along = value.along
    if (fixed is not None and along.dim != fixed) or along.dim >= len(shape_of(deciding)) - kind.inner:
        return None
    if any(isinstance(a, Node) for k, a in enumerate(node.args) if k not in kind.arguments):
        return None
    if any(isinstance(a, Node) for a in node.kwargs.values()):
        return None  # a mask of attention
    parts: dict[int, tuple[Node, ...]] = {}
    for position, dim in kind.arguments.items():
        argument = node.args[position] if position < len(node.args) else None
        if isinstance(argument, Node):
            parts[position] = builder.blocks(argument, along if dim is None else along.moved(dim))

    def block(k: int) -> Node:
        args = tuple(parts[i][k] if i in parts else a for i, a in enumerate(node.args))
        return builder.call(node.target, args, node.kwargs, block=k)

    blocks = builder.each(block)
    layouts = [along if dim is None else along.moved(dim) for dim in kind.results]
    results = blocks[0].meta["val"]
    if not isinstance(results, tuple | list):
        return Split(layouts[0], blocks)
    kept: Any = [layout if result is not None else "none" for layout, result in zip(layouts, results, strict=False)]
    found = several(blocks, builder, kept)
    return Several((*found.values, *(None for _ in results[len(layouts) :])))


RULES: dict[Any, Any] = {
    aten.convolution.default: convolution,
    aten.convolution_backward.default: convolution_backward,
    **dict.fromkeys(_ALIKE, alike),
}
