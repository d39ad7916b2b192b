"""A step with more variables than it uses: what whoever runs it keeps between steps, and checkpoints are to have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from millrace.graph.graph import Graph, feed_key, set_output, step_module
from millrace.graph.signature import BESIDE, Role, Variable


def beside_parameters(graph: Graph) -> Graph:
    """The same step with a variable for every parameter, of its shape, that begins as zeros.

    It is called like the parameter, behind `BESIDE`. The step neither reads nor changes it.
    """
    inputs = graph.placeholders()
    added = [
        Variable(BESIDE + v.name, v.spec, Role.OPTIMIZER, v.owner) for v in graph.variables if v.role is Role.PARAMETER
    ]
    fx = torch.fx.Graph()
    copies: dict[Node, Node] = {}

    def take(node: Node) -> None:
        copies[node] = _like(fx.node_copy(node, lambda n: copies[n]), node)

    for variable in graph.variables:
        take(inputs[variable.name])
    for number, variable in enumerate(added):
        _like(fx.placeholder(f"beside_{number}"), inputs[variable.owner])
    for feed in graph.feeds:
        take(inputs[feed_key(feed.name)])
    for node in graph.fx.nodes:
        if node not in copies and node.op != "output":
            take(node)
    results = {node.name: copies[node] for node in copies}
    set_output(fx, [results[name] for name in (*graph.fetches.values(), *graph.updates.values())])
    zeros = {v.name: torch.zeros_like(graph.initial[v.owner]) for v in added if v.owner in graph.initial}
    return graph.with_(
        module=step_module(graph.module, fx),
        variables=(*graph.variables, *added),
        fetches={name: results[node].name for name, node in graph.fetches.items()},
        updates={name: results[node].name for name, node in graph.updates.items()},
        initial={**graph.initial, **zeros},
        retrace=_retrace(graph.retrace) if graph.retrace is not None else None,
    )


def _retrace(plain: Callable[[Any], Graph]) -> Callable[[Any], Graph]:
    return lambda batch: beside_parameters(plain(batch))


def _like(node: Node, source: Node) -> Node:
    node.meta = dict(source.meta)
    return node
