"""A graph as segments that run one after the other on one device, so that some results are there before others."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from millrace.graph.graph import Graph, feed_key
from millrace.graph.passes.extract import ancestors
from millrace.partition.program import DeviceProgram
from millrace.partition.segments import Outline, build


@dataclass(frozen=True)
class InTurn:
    """A graph in segments.

    program: of one device, without sends and receives. values: fetch name -> the name of its value in the program, or
    "feed:NAME" for a feed. ready: of each stage, the segment after which all its values are there.
    """

    program: DeviceProgram
    values: dict[str, str]
    ready: tuple[int, ...]


def in_turn(graph: Graph, stages: Sequence[Sequence[str]]) -> InTurn:
    """Cut a graph so that the fetches of each stage are made as early as can be.

    The first segment has what the first stage needs, the next what the second stage needs besides, and the last one all
    the rest. Each keeps the graph's own order. Operators and their arguments are those of the whole graph, so that,
    run eagerly, the bits are too.

    Args: stages: names of fetches, no fetch twice; those in none of them come with the last segment.
    """
    device = ""
    inputs = graph.placeholders()
    feeds = {inputs[feed_key(feed.name)].name: feed_key(feed.name) for feed in graph.feeds}
    by_name = {node.name: node for node in graph.fx.nodes}
    fetched = {name: by_name[node] for name, node in graph.fetches.items()}
    outline = Outline(device)
    taken: set[Node] = set()
    ready = []
    for number, names in enumerate([*stages, list(fetched)]):
        needed = ancestors([fetched[name] for name in names]) if number < len(stages) else set(graph.nodes)
        _take(outline, f"stage {number}", graph, needed, taken)
        ready.append(max(len(outline.segments) - 1, 0))
    values = {name: feeds.get(node.name, node.name) for name, node in fetched.items()}
    handed = {value for value in values.values() if not value.startswith("feed:")}
    program = build(graph, outline, {variable.name: device for variable in graph.variables}, [], handed)
    return InTurn(program, values, tuple(ready[:-1]))


def _take(outline: Outline, name: str, graph: Graph, needed: set[Node], taken: set[Node]) -> None:
    """A segment of what is needed and not taken yet; none if that is nothing."""
    own = [node for node in graph.nodes if node not in taken and (node in needed or _picks_from(node) in needed)]
    taken.update(own)
    if own:
        outline.is_open = False
        outline.take(name, own)


def _picks_from(node: Node) -> Node:
    """Where several results come from one operator, the operator, so that they stay together."""
    while node.target is operator.getitem:
        node = node.all_input_nodes[0]
    return node
