"""The path that a node is grouped and hinted by."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch.fx import Node

from millrace.graph.graph import Graph, info
from millrace.graph.scopes import SHARED, modules_of, scope_of

STEP = "step"  # the path of what belongs to no module: what all updates share


def path_of(node: Node) -> str:
    """The module of a node, for an update that of its variable, with the block where a layer was split.

    "encoder.fc", or "encoder.fc.block 2"; "" for what belongs to no module, or to several.
    """
    scope, block = scope_of(node), info(node).block
    if scope in ("", SHARED):
        return ""
    return scope if block is None else f"{scope}.block {block}"


def inside(path: str, pattern: str) -> bool:
    """Whether a module matches a pattern, or lies in one that does."""
    parts = path.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def counted_to(graph: Graph) -> dict[Node, tuple[str, Node]]:
    """The module that every node is counted to, with its block, and the node that decided so; see `modules_of`."""
    return {node: (path or STEP, decided) for node, (path, decided) in modules_of(graph, path_of).items()}
