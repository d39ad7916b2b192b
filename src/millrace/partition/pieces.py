"""Parts of a graph that run in one go on one device, in the order in which they are to run."""

from __future__ import annotations

import heapq
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Node

from millrace.errors import GraphError
from millrace.graph.graph import Graph, info
from millrace.graph.signature import Phase
from millrace.graph.values import sources


@dataclass(frozen=True)
class Piece:
    """Nodes of one device that run together. nodes: their names, each after those it reads."""

    name: str
    device: str
    nodes: tuple[str, ...]


def greedy_pieces(graph: Graph, device_of: Mapping[str, str]) -> list[Piece]:
    """As few pieces as a simple rule gives: stay on a device while anything there is ready, and update last.

    Args: device_of: the device of every computing node; one that picks a result of another is placed with that.
    """
    nodes = graph.nodes
    device = {node: device_of[_producer(node).name] for node in nodes}
    position = {node: index for index, node in enumerate(nodes)}
    waiting = {node: sum(argument in position for argument in node.all_input_nodes) for node in nodes}
    ready: dict[str, list[tuple[bool, int]]] = {name: [] for name in device.values()}
    for node in nodes:
        if not waiting[node]:
            heapq.heappush(ready[device[node]], (_is_update(node), position[node]))
    pieces: list[tuple[str, list[Node]]] = []
    here = ""
    for _ in nodes:
        if not ready.get(here) or (ready[here][0][0] and any(heap and not heap[0][0] for heap in ready.values())):
            here = min((heap[0], name) for name, heap in ready.items() if heap)[1]
            pieces.append((here, []))
        node = nodes[heapq.heappop(ready[here])[1]]
        pieces[-1][1].append(node)
        for user in node.users:
            if user in waiting:
                waiting[user] -= 1
                if not waiting[user]:
                    heapq.heappush(ready[device[user]], (_is_update(user), position[user]))
    return [
        Piece(f"{index}", name, tuple(node.name for node in members)) for index, (name, members) in enumerate(pieces)
    ]


def checked(graph: Graph, pieces: Sequence[Piece]) -> list[list[Node]]:
    """The nodes of every piece, picks of results moved to what they pick from.

    Raises: GraphError when a node is in no piece or in two, or reads what a later piece makes.
    """
    by_name = {node.name: node for node in graph.nodes}
    place: dict[Node, int] = {}
    for index, piece in enumerate(pieces):
        for name in piece.nodes:
            if name not in by_name or by_name[name] in place:
                raise GraphError(f"piece {piece.name!r} lists {name!r}, which is no node of the graph or listed twice")
            place[by_name[name]] = index
    members: list[list[Node]] = [[] for _ in pieces]
    missing = [node.name for node in graph.nodes if node not in place]
    if missing:
        raise GraphError(f"{len(missing)} nodes are in no piece: {', '.join(missing[:5])}")
    place = {node: place[_producer(node)] for node in graph.nodes}
    for node in graph.nodes:  # in the graph's own order, which is one in which they can run
        members[place[node]].append(node)
        for argument in sources(node):  # what is cheap is made again where it is read, so it may come later
            if place.get(argument, 0) > place[node]:
                raise GraphError(
                    f"{node.name!r} in piece {pieces[place[node]].name!r} reads {argument.name!r}, which the later "
                    f"piece {pieces[place[argument]].name!r} makes"
                )
    return members


def _producer(node: Node) -> Node:
    """Where several results come from one operator, the operator."""
    while node.target is operator.getitem:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _is_update(node: Node) -> bool:
    return info(node).phase is Phase.UPDATE
