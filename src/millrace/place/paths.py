"""The path that a node is grouped and hinted by."""

from __future__ import annotations

from torch.fx import Node

from millrace.graph.graph import info
from millrace.graph.scopes import SHARED, scope_of


def path_of(node: Node) -> str:
    """The module of a node, for an update that of its variable, with the block where a layer was split.

    "encoder.fc", or "encoder.fc.block 2"; "" for what belongs to no module, or to several.
    """
    scope, block = scope_of(node), info(node).block
    if scope in ("", SHARED):
        return ""
    return scope if block is None else f"{scope}.block {block}"
