"""Which module a node is shown under, and how deep the tree of modules is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

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
    reads it, and its gradient to the same one; an update to the module that computes with the variable, which may be
    one around the variable's owner, or a layer inside of it.

    Args: path_of: the module that a node says it is of, "" for none.
    """
    found = {node: path_of(node) for node in graph.nodes}
    computing = {path for node, path in found.items() if path and info(node).phase is not Phase.UPDATE}
    position = {node: index for index, node in enumerate(found)}
    inner = _only_readers(graph, found)
    of_sequence: dict[int | None, str] = {}
    for node in found:
        if info(node).phase is Phase.UPDATE:
            reader = inner.get(info(node).variable, "")
            if found[node] and reader.startswith(f"{found[node]}."):
                found[node] = reader
            while found[node] not in computing and "." in found[node]:
                found[node] = found[node].rpartition(".")[0]
        elif not found[node]:
            sources = [a for a in node.all_input_nodes if found.get(a)]
            if info(node).phase is Phase.BACKWARD and of_sequence.get(info(node).sequence):
                found[node] = of_sequence[info(node).sequence]
            elif sources:
                found[node] = found[max(sources, key=position.__getitem__)]
        if info(node).phase is Phase.FORWARD and info(node).sequence is not None:
            of_sequence.setdefault(info(node).sequence, found[node])
    for node in reversed(list(found)):
        if not found[node] and info(node).phase is not Phase.UPDATE:
            found[node] = next((found[user] for user in node.users if found.get(user)), "")
    return found


def _only_readers(graph: Graph, paths: Mapping[Node, str]) -> dict[str, str]:
    """The variables that one module alone computes with, and its path."""
    found: dict[str, str] = {}
    for name, node in graph.placeholders().items():
        readers = {paths[user] for user in node.users if user in paths and info(user).phase is not Phase.UPDATE}
        if len(readers) == 1:
            found[name] = next(iter(readers))
    return found
