"""Which nodes give memory of their own, and which a view of what they read."""

from __future__ import annotations

import operator

import torch
from torch._ops import OpOverload
from torch.fx import Node

aten = torch.ops.aten


def may_alias(node: Node) -> bool:
    """Whether the node's result may share memory with an argument."""
    target = node.target
    if not isinstance(target, OpOverload):
        return True  # getitem of a view, control flow: assume so
    return target.is_view or any(r.alias_info is not None for r in target._schema.returns) or target in _MAYBE_VIEWS


def makes_memory(node: Node) -> bool:
    """Whether the node's result, or each of its results, lies in memory that it has made and shares with nothing else.

    Only operators of PyTorch itself are known to keep to their schemas: of all others it is not assumed.
    """
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, Node) and source.target is not operator.getitem and makes_memory(source)
    return isinstance(node.target, OpOverload) and node.target.namespace == "aten" and not may_alias(node)


# Their schemas promise new memory, or leave it open.
_MAYBE_VIEWS = {
    aten.reshape.default,
    aten.contiguous.default,
    aten._reshape_alias.default,
    aten._unsafe_view.default,
    aten.lift.default,
    aten.to.dtype,
}
