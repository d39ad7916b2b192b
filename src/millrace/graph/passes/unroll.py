"""K steps as one graph."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from millrace.graph.graph import INFO, Graph, NodeInfo, feed_key, set_output
from millrace.graph.signature import Feed, Phase, TensorSpec

aten = torch.ops.aten


def unroll(graph: Graph, steps: int) -> Graph:
    """`steps` runs of `graph`, each on the variables that the one before it left.

    Every feed gets a leading axis of `steps`; every fetch is stacked along one. What a step costs beside its kernels is
    paid once for all.
    """
    fx = torch.fx.Graph()
    values: dict[str, Node] = {}
    old = graph.placeholders()
    for variable in graph.variables:
        values[variable.name] = _like(fx.placeholder(old[variable.name].name), old[variable.name])
    stacked: dict[str, Node] = {}
    for feed in graph.feeds:
        source = old[feed_key(feed.name)]
        stacked[feed.name] = fx.placeholder(source.name)
        stacked[feed.name].meta["val"] = _stack_of(source.meta["val"], steps)
    fetched: dict[str, list[Node]] = {name: [] for name in graph.fetches}
    for index in range(steps):
        inputs = {old[name]: value for name, value in values.items()}
        for feed in graph.feeds:
            inputs[old[feed_key(feed.name)]] = _select(fx, stacked[feed.name], index)
        copied = _append(fx, graph, inputs)
        for name, node_name in graph.fetches.items():
            fetched[name].append(copied[node_name])
        values |= {variable: copied[node_name] for variable, node_name in graph.updates.items()}
    fetches = {name: _stack(fx, nodes) for name, nodes in fetched.items()}
    updates = {variable: values[variable] for variable in graph.updates}
    set_output(fx, [*fetches.values(), *updates.values()])
    return graph.with_(
        module=GraphModule(graph.module, fx, class_name="Steps"),
        feeds=tuple(Feed(f.name, TensorSpec((steps, *f.spec.shape), f.spec.dtype, f.spec.device)) for f in graph.feeds),
        fetches={name: node.name for name, node in fetches.items()},
        updates={name: node.name for name, node in updates.items()},
        retrace=None,
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


def _select(fx: torch.fx.Graph, stacked: Node, index: int) -> Node:
    node = fx.call_function(aten.select.int, (stacked, 0, index))
    node.meta = {"val": stacked.meta["val"][index], INFO: NodeInfo()}
    return node


def _stack(fx: torch.fx.Graph, nodes: list[Node]) -> Node:
    node = fx.call_function(aten.stack.default, (nodes,))
    node.meta = {"val": _stack_of(nodes[0].meta["val"], len(nodes)), INFO: NodeInfo(phase=Phase.FORWARD)}
    return node


def _stack_of(value: torch.Tensor, count: int) -> torch.Tensor:
    return value.unsqueeze(0).expand(count, *value.shape).clone(memory_format=torch.contiguous_format)
