"""In which layout the updates of variables want what leads to them.

The gradient of a split weight is to be made in blocks even where all it is made of is whole; and what leads to the
update of a whole variable is better joined once than computed in blocks with a variable that is not.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.fx import Node

from millrace.graph.graph import Graph
from millrace.graph.passes.splitting.builder import shape_of, tensors_in
from millrace.graph.passes.splitting.elementwise import is_elementwise
from millrace.graph.passes.splitting.layouts import PERMUTATIONS, RESHAPES, before_permutation, reshaped
from millrace.graph.passes.splitting.values import Along, Layout


def wishes(graph: Graph, chosen: Mapping[str, Along]) -> dict[Node, Layout]:
    """Node -> the layout (None: whole) that everything it leads to wants of it; nodes without such are left out."""
    found: dict[Node, set[Layout]] = {}
    for variable, name in graph.updates.items():
        found.setdefault(graph.node(name), set()).add(chosen.get(variable))
    for node in reversed(graph.nodes):
        wanted = found.get(node)
        if wanted is None or len(wanted) != 1 or not isinstance(node.meta.get("val"), Tensor):
            continue
        for source, layout in _before(node, next(iter(wanted))):
            found.setdefault(source, set()).add(layout)
    return {node: next(iter(layouts)) for node, layouts in found.items() if len(layouts) == 1}


def _before(node: Node, layout: Layout) -> list[tuple[Node, Layout]]:
    """What the operands should be for the result to be in the layout."""
    source = node.args[0] if node.args else None
    if is_elementwise(node.target):
        same = [n for n in tensors_in((node.args, node.kwargs)) if _shape(n) == _shape(node)]
        return [(operand, layout) for operand in same if operand.op == "call_function"]
    if not isinstance(source, Node) or source.op != "call_function":
        return []
    if layout is None:
        return [(source, None)] if node.target in PERMUTATIONS | RESHAPES else []
    if node.target in PERMUTATIONS:
        return [(source, before_permutation(node, layout))]
    if node.target in RESHAPES:
        before = reshaped(shape_of(node), shape_of(source), layout)
        return [(source, before)] if before is not None else []
    return []


def _shape(node: Node) -> tuple[int, ...] | None:
    return shape_of(node) if isinstance(node.meta.get("val"), Tensor) else None
