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


def modules_of(graph: Graph, path_of: Callable[[Node], str]) -> dict[Node, tuple[str, Node]]:
    """The module that every node is counted to, "" for none, and the node of it that decided so: mostly itself.

    What runs outside of all modules (a loss, the norm of a gradient) belongs to the module whose results it reads, or
    else to the one that reads it, and its gradient to the same one; an update to the module that computes with the
    variable, which may be one around the variable's owner, or a layer inside of it. What updates share belongs to none.

    Args: path_of: the module that a node says it is of, "" for none.
    """
    paths = {node: path_of(node) for node in graph.nodes}
    decided = {node: node for node in paths}
    computing = {path for node, path in paths.items() if path and info(node).phase is not Phase.UPDATE}
    position = {node: index for index, node in enumerate(paths)}
    inner = _only_readers(graph, paths)
    of_sequence: dict[int | None, Node] = {}
    for node in paths:
        known = info(node)
        if known.phase is Phase.UPDATE and paths[node]:
            reader = inner.get(known.variable, "")
            if reader.startswith(f"{paths[node]}."):
                paths[node] = reader
            while paths[node] not in computing and "." in paths[node]:
                paths[node] = paths[node].rpartition(".")[0]
        elif not paths[node]:
            sources = [a for a in node.all_input_nodes if a in paths]
            near = [a for a in sources if paths[a]]
            if known.phase is Phase.UPDATE and len({paths[a] for a in sources}) > 1:
                near = []
            elif known.phase is Phase.BACKWARD and known.sequence in of_sequence:
                near = [of_sequence[known.sequence]]
            if near:
                source = max(near, key=position.__getitem__)
                paths[node], decided[node] = paths[source], decided[source]
        if known.phase is Phase.FORWARD and known.sequence is not None and paths[node]:
            of_sequence.setdefault(known.sequence, node)
    for node in reversed(list(paths)):
        if not paths[node] and info(node).phase is not Phase.UPDATE:
            user = next((user for user in node.users if paths.get(user)), node)
            paths[node], decided[node] = paths[user], decided[user]
    return {node: (path, decided[node]) for node, path in paths.items()}


def _only_readers(graph: Graph, paths: Mapping[Node, str]) -> dict[str, str]:
    """The variables that one module alone computes with, and its path."""
    found: dict[str, str] = {}
    for name, node in graph.placeholders().items():
        readers = {paths[user] for user in node.users if user in paths and info(user).phase is not Phase.UPDATE}
        if len(readers) == 1:
            found[name] = next(iter(readers))
    return found
