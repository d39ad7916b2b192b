"""What one part of a graph needs of the others: the values that its nodes read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch._ops import OpOverload
from torch.fx import Node


def is_cheap(node: Node) -> bool:
    """Whether a node is made anew wherever it is read: a view of an input of the graph, or what reads nothing at all.

    So a weight that one layer reads transposed is neither copied between segments nor sent to where it already is.
    """
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    arguments = node.all_input_nodes
    if not arguments:
        return True
    return node.target.is_view and all(a.op in ("placeholder", "get_attr") or is_cheap(a) for a in arguments)


def sources(node: Node) -> Iterator[Node]:
    """The values that a node reads: inputs of the graph and other nodes, seen through what is cheap."""
    for argument in node.all_input_nodes:
        if is_cheap(argument):
            yield from sources(argument)
        elif argument.op != "get_attr":
            yield argument


def reads_of(nodes: Iterable[Node]) -> dict[Node, None]:
    """The values that some nodes read and none of them makes, in a fixed order."""
    members = list(nodes)
    own = set(members)
    return {source: None for node in members for source in sources(node) if source not in own}
