"""Drop nodes that undo each other, do nothing, or compute what another node has computed."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node

aten = torch.ops.aten


def simplify(graph: Graph) -> None:
    """In place, on an fx graph: double transposes, reshapes to the same shape, copies onto unused memory, common
    subexpressions, dead code."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        replacement = _simpler(node)
        if replacement is not None:
            node.replace_all_uses_with(replacement)
    _merge_equal(graph)
    graph.eliminate_dead_code()


def _merge_equal(graph: Graph) -> None:
    """Nodes with the same operator and arguments become one. Every operator of a graph is pure, so this is exact."""
    first: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            continue
        arguments = pytree.tree_map(_described, (node.args, dict(node.kwargs)))
        earlier = first.setdefault((node.target, repr(arguments)), node)
        if earlier is not node:
            node.replace_all_uses_with(earlier)


def _described(argument: Any) -> Any:
    # The types matter: 1, 1.0 and True are equal in Python but not to an operator.
    return argument.name if isinstance(argument, Node) else (type(argument).__name__, repr(argument))


def _simpler(node: Node) -> Node | None:
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return None
    if node.target is aten.t.default and source.target is aten.t.default:
        return _node(source.args[0])
    if node.target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        if source.target is aten.view.default:  # view(view(x)) = view(x)
            node.args = (source.args[0], *node.args[1:])
            source = _node(source.args[0])
        return source if _same_layout(node, source) else None
    if node.target is aten.expand.default:
        return source if _same_layout(node, source) else None
    if node.target is aten.copy.default:
        written = _node(node.args[1])
        return written if _same_layout(node, written) else None
    return None


def _node(argument: Any) -> Node:
    assert isinstance(argument, Node)
    return argument


def _same_layout(node: Node, other: Node) -> bool:
    a, b = node.meta.get("val"), other.meta.get("val")
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and a.shape == b.shape
        and a.dtype == b.dtype
        and a.stride() == b.stride()
        and a.device == b.device
    )
