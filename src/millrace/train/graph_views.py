"""A graph as TensorBoard's graph page is to show it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch.fx import Node

from millrace.graph.graph import Graph, info, spec_of
from millrace.graph.places import Places, crossings, short_names
from millrace.graph.values import is_cheap, sources
from millrace.train.events import NodeView


def node_views(graph: Graph, places: Places | None = None) -> Iterator[NodeView]:
    """The graph's nodes; of a placed one with their devices, and a Send and a Recv for all that goes between devices.

    The page colours by device where it is told to; what the caller feeds is on no device there.
    """
    if places is None:
        yield from (_view(node) for node in graph.fx.nodes if node.op != "output")
        return
    where = places.device_of(graph)
    short = short_names(dict.fromkeys([*places.notes, *where.values()]))
    received = {(value, to): f"{value.name}_on_{short[to]}" for value, to in crossings(graph, places)}
    for node in graph.fx.nodes:
        if node.op != "output":
            device = where.get(node)
            inputs = tuple(dict.fromkeys(_inputs(node, where, received)))
            yield replace(_view(node), device=device, inputs=inputs)
    for (value, target), readers in crossings(graph, places).items():
        yield from _transfer(value, readers, (where[value], target), received[value, target], short)


def _view(node: Node) -> NodeView:
    spec, origin = spec_of(node), info(node)
    return NodeView(
        name=node.name,
        op=str(node.target) if node.op == "call_function" else node.op,
        inputs=tuple(n.name for n in node.all_input_nodes),
        scope=origin.scope or origin.variable.replace("*", ""),
        phase=str(origin.phase) if node.op == "call_function" else "forward",
        shape=spec.shape if spec else None,
        dtype=str(spec.dtype) if spec else None,
        device=spec.device if spec else None,
    )


def _inputs(node: Node, where: Mapping[Node, str], received: Mapping[tuple[Node, str], str]) -> Iterator[str]:
    """The inputs of a node, from other devices by what received them there."""
    here = where.get(node, "")
    for argument in node.all_input_nodes:
        # A view of a variable is made again where it is read.
        apart = is_cheap(argument) and where.get(argument, here) != here
        for value in sources(argument) if apart else (argument,):
            yield f"recv_{received[value, here]}" if (value, here) in received else value.name


def _transfer(
    value: Node, readers: Sequence[Node], ends: tuple[str, str], name: str, short: Mapping[str, str]
) -> Iterator[NodeView]:
    """A Send beside what makes a value, and a Recv beside the first that reads it on the other device."""
    source, target = ends
    made = _view(value)
    sent = replace(made, name=f"send_{name}", op=f"Send to {short[target]}", inputs=(value.name,), device=source)
    there = _view(readers[0]) if readers else made
    yield sent
    yield replace(
        sent,
        name=f"recv_{name}",
        op=f"Recv from {short[source]}",
        inputs=(sent.name,),
        scope=there.scope,
        phase=there.phase,
        device=target,
    )
