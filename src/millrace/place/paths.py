"""The path that a node is grouped and hinted by."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch.fx import Node

from millrace.graph.graph import Graph, info
from millrace.graph.scopes import SHARED, scope_of
from millrace.graph.signature import Phase

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
    """The module that every node is counted to, and the node of it that decided so: mostly itself.

    What runs outside of all modules (a loss) belongs to the module whose results it reads, or else to the one that
    reads it; an update to the module that computes with the variable, which may be one around the variable's owner.
    """
    paths = {node: path_of(node) for node in graph.nodes}
    decided = {node: node for node in paths}
    computing = {path for node, path in paths.items() if path and info(node).phase is not Phase.UPDATE}
    position = {node: index for index, node in enumerate(paths)}
    for node in paths:
        if info(node).phase is Phase.UPDATE:
            while paths[node] not in computing and "." in paths[node]:
                paths[node] = paths[node].rpartition(".")[0]
        elif not paths[node]:
            sources = [a for a in node.all_input_nodes if paths.get(a)]
            if sources:
                source = max(sources, key=position.__getitem__)
                paths[node], decided[node] = paths[source], decided[source]
    for node in reversed(list(paths)):
        if not paths[node] and info(node).phase is not Phase.UPDATE:
            user = next((user for user in node.users if paths.get(user)), node)
            paths[node], decided[node] = paths[user], decided[user]
    return {node: (path or STEP, decided[node]) for node, path in paths.items()}
