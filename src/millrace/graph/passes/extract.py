"""A part of a graph as a graph of its own, which is given some of the whole one's values as feeds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import Node

from millrace.graph.graph import Graph, feed_key, set_output, step_module
from millrace.graph.signature import Feed


def extract(
    graph: Graph, fetches: Mapping[str, Node], updates: Mapping[str, Node], given: Mapping[Feed, Node] | None = None
) -> Graph:
    """The part of `graph` that computes `fetches` and the new values `updates` of variables.

    Unlike a pruned graph it has only the variables that it reads or updates, with their `initial` values.

    Args:
        fetches, updates: fetch or variable name -> node of `graph`.
        given: the feeds, in order, and the nodes of `graph` whose values they bring; what is before those is left out.
            A batch is then a dict of tensors by the feeds' names. None keeps the feeds of `graph`.

    Returns: a graph that cannot be traced again.
    """
    inputs = graph.placeholders()
    taken = {node: feed for feed, node in given.items()} if given is not None else {}
    results = [*fetches.values(), *updates.values()]
    needed = ancestors(results, taken)
    variables = [v for v in graph.variables if v.name in updates or inputs[v.name] in needed - taken.keys()]
    fx = torch.fx.Graph()
    copies = {}
    for variable in variables:
        copies[inputs[variable.name]] = _like(fx.placeholder(inputs[variable.name].name), inputs[variable.name])
    if given is None:
        taken = {inputs[feed_key(feed.name)]: feed for feed in graph.feeds}
    # A variable of which an earlier value is given may be updated as well; then it stands among the inputs twice.
    copies |= {node: _like(fx.placeholder(_identifier(feed.name)), node) for node, feed in taken.items()}
    for node in graph.fx.nodes:
        if node in needed and node not in copies:
            copies[node] = _like(fx.node_copy(node, lambda n: copies[n]), node)
    set_output(fx, [copies[node] for node in results])
    named = {v.name for v in variables}
    return graph.with_(
        module=step_module(graph.module, fx),
        variables=tuple(variables),
        feeds=tuple(taken.values()),
        fetches={name: copies[node].name for name, node in fetches.items()},
        updates={name: copies[node].name for name, node in updates.items()},
        feed_tree=graph.feed_tree if given is None else _tree_of(feed.name for feed in given),
        initial={name: tensor for name, tensor in graph.initial.items() if name in named},
        retrace=None,
    )


def ancestors(results: Iterable[Node], given: Iterable[Node] = ()) -> set[Node]:
    """The nodes that `results` are computed from, themselves included, as far as they are not behind `given` ones."""
    ends, found = set(given), set[Node]()
    waiting = list(results)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            if node not in ends:
                waiting += node.all_input_nodes
    return found


def _tree_of(names: Iterable[str]) -> str:
    nest: dict[str, Any] = dict.fromkeys(names, 0)
    return pytree.treespec_dumps(pytree.tree_structure(nest))


def _identifier(name: str) -> str:
    return "feed_" + re.sub(r"\W", "_", name)


def _like(node: Node, source: Node) -> Node:
    node.meta = dict(source.meta)
    return node
