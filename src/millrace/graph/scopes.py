"""Which module a node is shown under, and how deep the tree of modules is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch.fx import Node

from millrace.graph.graph import Graph, info
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


def modules_of(graph: Graph, path_of: Callable[[Node], str]) -> dict[Node, str]:
    """The module that every node is counted to; "" for what belongs to none.

    What runs outside of all modules (a loss) belongs to the module whose results it reads, or else to the one that
    reads it; an update to the module that computes with the variable, which may be one around the variable's owner.

    Args: path_of: the module that a node says it is of, "" for none.
    """
    found = {node: path_of(node) for node in graph.nodes}
    computing = {path for node, path in found.items() if path and info(node).phase is not Phase.UPDATE}
    position = {node: index for index, node in enumerate(found)}
    for node in found:
        if info(node).phase is Phase.UPDATE:
            while found[node] not in computing and "." in found[node]:
                found[node] = found[node].rpartition(".")[0]
        elif not found[node]:
            sources = [a for a in node.all_input_nodes if found.get(a)]
            if sources:
                found[node] = found[max(sources, key=position.__getitem__)]
    for node in reversed(list(found)):
        if not found[node] and info(node).phase is not Phase.UPDATE:
            found[node] = next((found[user] for user in node.users if found.get(user)), "")
    return found
