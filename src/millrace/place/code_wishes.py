"""What a model's own code says of where its nodes run, by `with millrace.device` and `with millrace.colocate`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from millrace.graph.graph import Graph, Wish, info
from millrace.graph.signature import Phase
from millrace.graph.values import is_cheap
from millrace.place.paths import counted_to


@dataclass(frozen=True)
class Said:
    """What code says of a node. itself: whether of this very node; otherwise it has it from others, and hints may say
    differently. used: the variable from whose use an update has it."""

    device: Wish | None = None
    together: Wish | None = None
    itself: bool = True
    used: str = ""


def said_in_code(graph: Graph) -> dict[Node, Said]:
    """What the code says of every node, where it says anything.

    Tracing has written it on forward and backward nodes. An update that stands in no `with` follows the first use of
    its variable in one. What runs outside of all modules and of every `with`, as the sum of a weight's gradients does,
    goes with the node that it is counted to.
    """
    own = {node: Said(info(node).device, info(node).together) for node in graph.nodes}
    if not any(map(_says_anything, own.values())):
        return {}
    inputs = graph.placeholders()
    found = {}
    for node, (_, counted) in counted_to(graph).items():
        said, variable = own[node], info(node).variable
        if not _says_anything(said):
            if info(node).phase is not Phase.UPDATE:
                said = Said(own[counted].device, own[counted].together, itself=counted is node)
            elif variable in inputs:
                said = _of_first_use(inputs[variable], own, variable)
        found[node] = Said(_unless_lifted(said.device), _unless_lifted(said.together), said.itself, said.used)
    return {node: said for node, said in found.items() if _says_anything(said)}


def _of_first_use(variable: Node, own: dict[Node, Said], name: str) -> Said:
    readers = set(_forward_readers(variable))
    uses = [said for node, said in own.items() if node in readers]
    device = next((said.device for said in uses if said.device), None)
    together = next((said.together for said in uses if said.together), None)
    return Said(device, together, itself=False, used=name)


def _forward_readers(node: Node) -> Iterator[Node]:
    """The forward nodes that compute with a value."""
    for user in node.users:
        if user.op == "call_function" and info(user).phase is Phase.FORWARD:
            if is_cheap(user):
                yield from _forward_readers(user)
            else:
                yield user


def _says_anything(said: Said) -> bool:
    return said.device is not None or said.together is not None


def _unless_lifted(wish: Wish | None) -> Wish | None:
    return wish if wish and wish.name else None
