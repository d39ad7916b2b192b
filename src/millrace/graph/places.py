"""Where the nodes of a graph run, as plain data for whatever shows it: how it was decided is not known here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch.fx import Node

from millrace.graph.graph import Graph
from millrace.graph.values import sources


@dataclass(frozen=True)
class Places:
    """nodes: the device of every computing node, by the node's name. variables: the device that each lives on.

    notes: all devices, in the order in which they are to be shown, each with a few words about it.
    summary: a line about the whole.
    """

    nodes: Mapping[str, str]
    variables: Mapping[str, str]
    notes: Mapping[str, str] = field(default_factory=dict)
    summary: str = ""

    def device_of(self, graph: Graph) -> dict[Node, str]:
        """The device of every node, and of the placeholder of every variable."""
        inputs = graph.placeholders()
        held = {inputs[name]: device for name, device in self.variables.items() if name in inputs}
        return held | {node: self.nodes[node.name] for node in graph.nodes if node.name in self.nodes}


def crossings(graph: Graph, places: Places) -> dict[tuple[Node, str], list[Node]]:
    """What goes between devices in a step: (value, device that it goes to) -> the nodes there that read it.

    A value is what a node makes, or a variable as it was before the step, and goes to each device once. A view of a
    variable is no value: it is made again wherever it is read. A new value of a variable that lives elsewhere goes to
    its home, where nothing need read it.
    """
    where = places.device_of(graph)
    found: dict[tuple[Node, str], list[Node]] = {}
    for node in graph.nodes:
        here = where.get(node, "")
        for source in dict.fromkeys(sources(node)):
            if here and where.get(source, here) != here:
                found.setdefault((source, here), []).append(node)
    for variable, name in graph.updates.items():
        node, home = graph.node(name), places.variables.get(variable, "")
        if home and where.get(node, home) != home:
            found.setdefault((node, home), [])
    return found


def short_names(devices: Iterable[str]) -> dict[str, str]:
    """Device -> "gpu:1" for "/host:0/gpu:1" where all are of one host; otherwise "host:0/gpu:1"."""
    names = list(devices)
    alone = len({name.rpartition("/")[0] for name in names}) == 1
    return {name: name.rpartition("/")[2] if alone else name.lstrip("/") for name in names}
