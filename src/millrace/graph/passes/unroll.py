"""K steps as one graph."""

from __future__ import annotations

import torch
from torch.fx import Node

from millrace.graph.graph import INFO, Graph, NodeInfo, feed_key, set_output, step_module
from millrace.graph.signature import Feed, Phase

aten = torch.ops.aten


def unroll(graph: Graph, steps: int) -> Graph:
    """`steps` runs of `graph`, each on the variables that the one before it left.

    The feeds are those of the first step, then those of the second, …, named "0.images", "0.labels", "1.images", …;
    every fetch is stacked along a new first axis. What a step costs beside its kernels is paid once for all.
    """
    fx = torch.fx.Graph()
    values: dict[str, Node] = {}
    old = graph.placeholders()
    for variable in graph.variables:
        values[variable.name] = _like(fx.placeholder(old[variable.name].name), old[variable.name])
    sources = [old[feed_key(feed.name)] for feed in graph.feeds]
    feeds = [[_like(fx.placeholder(f"step{index}_{node.name}"), node) for node in sources] for index in range(steps)]
    fetched: dict[str, list[Node]] = {name: [] for name in graph.fetches}
    for index in range(steps):
        inputs = {old[name]: value for name, value in values.items()}
        inputs |= dict(zip(sources, feeds[index], strict=True))
        copied = _append(fx, graph, inputs)
        for name, node_name in graph.fetches.items():
            fetched[name].append(copied[node_name])
        values |= {variable: copied[node_name] for variable, node_name in graph.updates.items()}
    fetches = {name: _stack(fx, nodes) for name, nodes in fetched.items()}
    updates = {variable: values[variable] for variable in graph.updates}
    set_output(fx, [*fetches.values(), *updates.values()])
    return graph.with_(
        module=step_module(graph.module, fx),
        feeds=tuple(Feed(f"{index}.{f.name}", f.spec) for index in range(steps) for f in graph.feeds),
        fetches={name: node.name for name, node in fetches.items()},
        updates={name: node.name for name, node in updates.items()},
        retrace=None,
        steps=graph.steps * steps,
    )


def _append(fx: torch.fx.Graph, graph: Graph, mapping: dict[Node, Node]) -> dict[str, Node]:
    """Copy the computation of `graph` with its inputs replaced; return the new node of every old name."""
    mapping = dict(mapping)
    for node in graph.fx.nodes:
        if node.op in ("call_function", "get_attr"):
            mapping[node] = _like(fx.node_copy(node, lambda n: mapping[n]), node)
    return {node.name: new for node, new in mapping.items()}


def _like(node: Node, source: Node) -> Node:
    node.meta = dict(source.meta)
    return node


def _stack(fx: torch.fx.Graph, nodes: list[Node]) -> Node:
    node = fx.call_function(aten.stack.default, (nodes,))
    node.meta = {"val": _stack_of(nodes[0].meta["val"], len(nodes)), INFO: NodeInfo(phase=Phase.FORWARD)}
    return node


def _stack_of(value: torch.Tensor, count: int) -> torch.Tensor:
    return value.unsqueeze(0).expand(count, *value.shape).clone(memory_format=torch.contiguous_format)
