"""What the arrows of a picture carry: the bytes of the values that one box reads of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.fx import Node

from millrace.graph.graph import Graph
from millrace.graph.picture.layout import Edge
from millrace.graph.places import Places, crossings
from millrace.graph.sizes import value_bytes
from millrace.graph.values import is_cheap


def sent_variables(graph: Graph, places: Places) -> dict[str, list[Node]]:
    """The variables that are read on other devices than they live on, by their device."""
    found: dict[str, dict[Node, None]] = {}
    where = places.device_of(graph)
    for value, _ in crossings(graph, places):
        if value.op == "placeholder":
            found.setdefault(where[value], {})[value] = None
    return {device: list(values) for device, values in found.items()}


def arrows(
    graph: Graph, box_of: Mapping[Node, int], fetched: Sequence[tuple[Node, int]], places: Places | None
) -> dict[Edge, int]:
    """The bytes on every arrow; a value that several nodes of a box read is counted once.

    Args:
        box_of: the box of nodes and feeds, and of variables that have one.
        fetched: nodes with the boxes of the fetches that they are.
        places: where the graph is placed. A view of a variable is not drawn between devices: what goes there is the
            variable, and the view is made again.
    """
    where = places.device_of(graph) if places else {}
    carried: dict[Edge, dict[Node, int]] = {}

    def carry(source: Node, target: int) -> None:
        if source in box_of and box_of[source] != target:
            carried.setdefault((box_of[source], target), {})[source] = value_bytes(source.meta.get("val"))

    for node in graph.nodes:
        for source in node.all_input_nodes:
            apart = where.get(source, where.get(node)) != where.get(node)
            a_variable = source.op == "placeholder" and source in where
            if not a_variable and not (apart and is_cheap(source)):
                carry(source, box_of[node])
    for (value, _), readers in (crossings(graph, places) if places else {}).items():
        for reader in readers if value.op == "placeholder" else ():
            carry(value, box_of[reader])
    for node, box in fetched:
        carry(node, box)
    return {edge: sum(sizes.values()) for edge, sizes in carried.items()}
