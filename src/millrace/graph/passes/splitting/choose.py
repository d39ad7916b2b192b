"""Which variables are split, and how."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from millrace.graph.graph import Graph, info
from millrace.graph.passes.splitting.builder import shape_of
from millrace.graph.passes.splitting.channels import fed_channels
from millrace.graph.passes.splitting.layouts import PERMUTATIONS, order_of
from millrace.graph.passes.splitting.values import Along, even
from millrace.graph.signature import Phase, Role, Variable

aten = torch.ops.aten
_FACTORS = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1, aten.baddbmm.default: 1}  # the first one
_SAME_PLACES = {aten._to_copy.default, aten.clone.default}


@dataclass
class _Uses:
    """Where a parameter is a layer's weight: the operators, how to divide it for each, and how wide the layer is."""

    operators: list[Node] = field(default_factory=list)
    layouts: set[Along | None] = field(default_factory=set)
    width: int = 0


def weights_to_split(graph: Graph, parts: int, min_width: int) -> dict[str, Along]:
    """The weights of layers at least `min_width` wide, by the dimension that makes the layer's outputs.

    A recurrent layer stays whole, with all that belongs to its module: its blocks would meet at every time step.
    """
    inputs = graph.placeholders()
    found: dict[str, Along] = {}
    recurrent: set[str] = set()
    for variable in graph.variables:
        if variable.role not in (Role.PARAMETER, Role.TENSOR):
            continue
        node = inputs[variable.name]
        uses = _Uses()
        _find_uses(node, list(range(len(shape_of(node)))), parts, uses)
        if _is_recurrent(uses.operators):
            recurrent.add(_module_of(variable.name))
        elif len(uses.layouts) == 1 and uses.width >= max(min_width, parts):
            layout = next(iter(uses.layouts))
            if layout is not None and _in_one_piece(node, layout):
                found[variable.name] = layout
    return {name: along for name, along in found.items() if _module_of(name) not in recurrent}


def with_slots(graph: Graph, chosen: Mapping[str, Along]) -> dict[str, Along]:
    """The chosen variables and the optimizer's slots of their shape."""
    shapes = {v.name: v.spec.shape for v in graph.variables}
    slots = {
        v.name: chosen[v.owner]
        for v in graph.variables
        if v.role is Role.OPTIMIZER and v.owner in chosen and v.spec.shape == shapes[v.owner]
    }
    return {**chosen, **slots}


def only_sliced(
    variable: Variable, node: Node, slices: Mapping[tuple[Node, Along], tuple[Node, ...]], min_width: int
) -> Along | None:
    """How a variable that was left whole is cut wherever forward and backward pass read it, if always alike.

    Such are the biases of split layers, and the statistics of their batch norms.
    """
    if variable.role not in (Role.PARAMETER, Role.BUFFER, Role.TENSOR):
        return None
    if math.prod(shape_of(node)) < min_width:
        return None
    readers = {user for user in node.users if user.op == "call_function" and info(user).phase is not Phase.UPDATE}
    for (source, along), cut in slices.items():
        if source is node and readers and readers <= set(cut) and _in_one_piece(node, along):
            return along
    return None


def _find_uses(node: Node, dims: list[int], parts: int, uses: _Uses) -> None:
    """Follow a parameter through permutations; `dims` are the parameter's own dimensions in their present order."""
    for user in node.users:
        if user.op != "call_function" or info(user).phase is not Phase.FORWARD:
            continue
        if user.target in PERMUTATIONS:
            _find_uses(user, [dims[d] for d in order_of(user)], parts, uses)
        elif user.target in _SAME_PLACES:
            _find_uses(user, dims, parts, uses)
        for width, layout in _as_weight(user, node, dims, parts):
            if user.target is not aten.embedding.default:  # a table may be the last layer's weight, too
                uses.operators.append(user)
            uses.layouts.add(layout)
            uses.width = max(uses.width, width)


def _as_weight(user: Node, node: Node, dims: list[int], parts: int) -> Iterator[tuple[int, Along | None]]:
    """(how wide the layer is, how to divide its weight) where `user` is a layer and `node` its weight."""
    shape = shape_of(node)
    if user.target in _FACTORS:
        first = _FACTORS[user.target]
        for position, outer in ((first, -2), (first + 1, -1)):
            if user.args[position] is node and len(shape) == 3:  # a layer for each member of the batch, side by side
                yield shape[0] * shape[outer], _even(shape[0], parts, dims[0])
            elif user.args[position] is node:
                yield shape[outer], _even(shape[outer], parts, dims[outer])
    elif user.target is aten.convolution.default and user.args[1] is node and not user.args[6]:
        layout = _even(shape[0], parts, dims[0])
        fits = layout is not None and fed_channels(layout, shape, int(user.args[8])) is not None  # type: ignore[arg-type]
        yield shape[0], layout if fits else None
    elif user.target is aten.embedding.default and user.args[0] is node:
        yield shape[0], _even(shape[0], parts, dims[0])


def _even(extent: int, parts: int, dim: int) -> Along | None:
    return even(extent, parts, dim) if extent >= parts else None


def _in_one_piece(node: Node, along: Along) -> bool:
    """Whether each block is a view without gaps of the variable's memory.

    Copies of others, as a compiled step is proved on, would lie differently.
    """
    with node.meta["val"].fake_mode:
        block = node.meta["val"].narrow(along.dim, 0, along.bounds[1])
        return torch.empty_like(block).stride() == block.stride()


def _is_recurrent(operators: list[Node]) -> bool:
    """Whether one of the operators depends on another."""
    targets = set(operators)
    waiting, seen = list(operators) if len(operators) > 1 else [], set[Node]()
    while waiting:
        for user in waiting.pop().users:
            if user in targets and info(user).phase is Phase.FORWARD:
                return True
            if user not in seen and user.op == "call_function" and info(user).phase is Phase.FORWARD:
                seen.add(user)
                waiting.append(user)
    return False


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]
