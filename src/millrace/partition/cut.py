"""Cut a graph into one program per device.

What pieces share, they hand over as values: on one device by name, between devices over an edge, once per value and
receiving device. Pieces that follow each other on a device and wait for nothing in between become one segment, which is
compiled as one. A value is sent as soon as its segment has ended, and waited for just before the first piece that reads
it.

Every device follows one common order of pieces, and only ever waits for a piece that comes earlier in it: so no
placement can make devices wait for each other in a circle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch.fx import Node

from millrace.errors import GraphError
from millrace.graph.graph import Graph, feed_key
from millrace.graph.signature import TensorSpec
from millrace.graph.values import reads_of
from millrace.partition.pieces import Piece, checked
from millrace.partition.program import Edge, Partition, Recv, Send
from millrace.partition.segments import Outline, build


def cut(graph: Graph, pieces: Sequence[Piece], homes: Mapping[str, str] | None = None) -> Partition:
    """The programs of all devices named in `pieces` or `homes`.

    Args:
        pieces: they hold every node once, in an order in which they can run; it becomes the order of each device.
        homes: variable -> the device that it lives on. Otherwise it lives where it is updated, or, if it never changes,
            where it is first read. Needed where there are no pieces, as nothing is computed.

    Raises: GraphError for pieces that do not fit the graph, or when nothing names a device.
    """
    members = checked(graph, pieces)
    given = dict(homes or {})
    somewhere = next((device for device in (*(piece.device for piece in pieces), *given.values())), "")
    if not somewhere and (graph.variables or any(n.op == "get_attr" for n in graph.fx.nodes)):
        raise GraphError("the graph computes nothing, so there are no pieces: say by `homes` where its variables live")
    where = {node: piece.device for piece, nodes in zip(pieces, members, strict=True) for node in nodes}
    reads = [reads_of(nodes) for nodes in members]
    homes = _homes(graph, pieces, where, reads, somewhere) | given
    inputs = graph.placeholders()
    where |= {inputs[variable]: home for variable, home in homes.items()}
    readers = _readers(graph, pieces, reads, where, homes)
    devices = dict.fromkeys([*(piece.device for piece in pieces), *homes.values()])
    outlines = {device: Outline(device) for device in devices}
    edges = _Edges(outlines)
    for node in (inputs[v.name] for v in graph.variables):  # as they were before the step, and so before all else
        edges.send(node, where[node], readers.get(node, []))
    for piece, nodes, needed in zip(pieces, members, reads, strict=True):
        edges.receive(piece.device, [n for n in needed if where.get(n, piece.device) != piece.device])
        outlines[piece.device].take(piece.name, nodes)
        for node in nodes:
            edges.send(node, piece.device, readers.get(node, []))
    edges.receive_rest()
    fetches = {name: _found_at(graph, graph.node(node), where, somewhere) for name, node in graph.fetches.items()}
    programs = {
        device: build(graph, outline, homes, edges.all, {value for at, value in fetches.values() if at == device})
        for device, outline in outlines.items()
    }
    return Partition(programs, tuple(edges.all), fetches, homes)


@dataclass
class _Edges:
    """The edges made so far, and the instructions that go with them."""

    outlines: Mapping[str, Outline]
    all: list[Edge] = field(default_factory=list)
    waiting: dict[tuple[str, str], int] = field(default_factory=dict)  # (value, device) -> edge not received yet

    def send(self, node: Node, source: str, targets: Sequence[str]) -> None:
        for target in targets:
            edge = Edge(len(self.all), source, target, node.name, TensorSpec.of(node.meta["val"]))
            self.all.append(edge)
            self.waiting[node.name, target] = edge.number
            self.outlines[source].instructions.append(Send(edge.number))
            self.outlines[source].is_open = False

    def receive(self, device: str, nodes: Sequence[Node]) -> None:
        for node in nodes:
            number = self.waiting.pop((node.name, device), None)
            if number is not None:
                self.outlines[device].instructions.append(Recv(number))
                self.outlines[device].is_open = False

    def receive_rest(self) -> None:
        """What no piece reads: new values of variables that live elsewhere than they are made."""
        for (_, device), number in self.waiting.items():
            self.outlines[device].instructions.append(Recv(number))
        self.waiting.clear()


def _homes(
    graph: Graph,
    pieces: Sequence[Piece],
    where: Mapping[Node, str],
    reads: Sequence[Mapping[Node, None]],
    somewhere: str,
) -> dict[str, str]:
    """The device of every variable. somewhere: for those that nothing computes with."""
    first: dict[Node, str] = {}
    for piece, needed in zip(pieces, reads, strict=True):
        for node in needed:
            first.setdefault(node, piece.device)
    homes = {}
    inputs = graph.placeholders()
    for variable in graph.variables:
        new = graph.node(graph.updates[variable.name]) if variable.name in graph.updates else None
        made = where.get(new) if new is not None else None
        homes[variable.name] = made or first.get(inputs[variable.name]) or somewhere
    return homes


def _readers(
    graph: Graph,
    pieces: Sequence[Piece],
    reads: Sequence[Mapping[Node, None]],
    where: Mapping[Node, str],
    homes: Mapping[str, str],
) -> dict[Node, list[str]]:
    """The other devices at which each value is read, in the order of their first reading."""
    found: dict[Node, dict[str, None]] = {}
    for piece, needed in zip(pieces, reads, strict=True):
        for node in needed:
            if where.get(node, piece.device) != piece.device:
                found.setdefault(node, {})[piece.device] = None
    for variable, name in graph.updates.items():  # a variable may take over another one as it is
        node = graph.node(name)
        if where.get(node, homes[variable]) != homes[variable]:
            found.setdefault(node, {})[homes[variable]] = None
    return {node: list(devices) for node, devices in found.items()}


def _found_at(graph: Graph, node: Node, where: Mapping[Node, str], somewhere: str) -> tuple[str, str]:
    """(device, value) of a fetch; a feed is on no device, and the caller has it."""
    inputs = graph.placeholders()
    for feed in graph.feeds:
        if inputs[feed_key(feed.name)] is node:
            return "", feed_key(feed.name)
    return where.get(node, somewhere), node.name
