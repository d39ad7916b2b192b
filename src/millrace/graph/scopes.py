"""Which module a node is shown under, and how deep the tree of modules is shown."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from millrace.graph.graph import info
from millrace.graph.signature import Phase

SHARED = "*"  # the scope of update nodes that serve several variables


def scope_of(node: Node) -> str:
    """The path of the module a node belongs to: for an update node, the module of its variable."""
    known = info(node)
    if known.phase is not Phase.UPDATE:
        return known.scope
    return known.variable if known.variable in ("", SHARED) else owner_scope(known.variable)


def owner_scope(variable: str) -> str:
    """The path of the module that a variable belongs to: "fc" for "fc.weight"."""
    return variable.rpartition(".")[0]


def cut(scope: str, depth: int) -> str:
    """The first `depth` parts of a path."""
    return ".".join(scope.split(".")[:depth])


def fitting_depth(scopes: Iterable[str], limit: int) -> int:
    """The greatest depth at which at most `limit` different paths remain (at least 1)."""
    paths = set(scopes)
    deepest = max((path.count(".") + 1 for path in paths), default=1)
    for depth in range(deepest, 1, -1):
        if len({cut(path, depth) for path in paths}) <= limit:
            return depth
    return 1
