"""From what the tracer recorded to a `Graph`: outputs in place of copies, noise removed, every node labelled."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from millrace.graph.check import check
from millrace.graph.graph import INFO, Graph, NodeInfo, info, set_output, step_module
from millrace.graph.passes.merge_counters import merge_counters
from millrace.graph.passes.simplify import simplify
from millrace.graph.signature import Feed, Phase, Variable
from millrace.graph.tracing.recorder import ORIGIN, Origin

aten = torch.ops.aten
_IDENTITIES = {aten.detach.default, aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.alias.default}
_PROFILER = ("profiler.", "_record_function")


def finish(
    functional: GraphModule,
    *,
    variables: Sequence[Variable],
    feeds: Sequence[Feed],
    fetches: Sequence[str],
    feed_tree: str,
    initial: Mapping[str, Tensor],
    retrace: Callable[[Any], Graph],
) -> Graph:
    """Make the graph of a functionalized recording.

    `functional` ends in `aten.copy_(placeholder, value)` for every variable that the step changed and returns the
    fetches, in order.
    """
    fx_graph = functional.graph
    placeholders = [n for n in fx_graph.nodes if n.op == "placeholder"]
    by_node = dict(zip(placeholders, [v.name for v in variables], strict=False))
    updates = _take_updates(fx_graph, by_node)
    _strip(fx_graph)
    updates = {name: _skip_identities(node) for name, node in updates.items()}
    output = next(iter(fx_graph.find_nodes(op="output")))
    fetched = [_skip_identities(n) for n in output.args[0]] if fetches else []
    # A step may hand a variable back unchanged (frozen BatchNorm does).
    updates = {name: node for name, node in updates.items() if by_node.get(node) != name}
    kept = {v.name for v in variables}
    if "random" in kept and "random" not in updates:
        kept.discard("random")
    inputs = dict(zip([v.name for v in variables], placeholders, strict=False))
    kept -= merge_counters(variables, inputs, updates, initial)
    set_output(fx_graph, [*fetched, *updates.values()])
    _drop_identities(fx_graph)
    simplify(fx_graph)
    _name_inputs(fx_graph, placeholders, variables, feeds, kept)
    results = list(next(iter(fx_graph.find_nodes(op="output"))).args[0])
    label(fx_graph, dict(zip(updates, results[len(fetches) :], strict=True)), {v.name: v.owner for v in variables})
    module = step_module(functional, fx_graph)
    graph = Graph(
        module=module,
        variables=tuple(v for v in variables if v.name in kept),
        feeds=tuple(feeds),
        fetches={name: node.name for name, node in zip(fetches, results, strict=False)},
        updates={name: node.name for name, node in zip(updates, results[len(fetches) :], strict=True)},
        feed_tree=feed_tree,
        initial={name: tensor for name, tensor in initial.items() if name in kept},
        retrace=retrace,
    )
    check(graph)
    return graph


def _take_updates(graph: torch.fx.Graph, by_node: Mapping[Node, str]) -> dict[str, Node]:
    """Remove the final copies into placeholders and say what they copied."""
    updates: dict[str, Node] = {}
    for node in list(graph.nodes):
        if node.target is aten.copy_.default and node.args[0] in by_node:
            updates[by_node[node.args[0]]] = node.args[1]
            node.replace_all_uses_with(node.args[1])
            graph.erase_node(node)
    return updates


def _strip(graph: torch.fx.Graph) -> None:
    """Erase what computes nothing: the profiler's marks, which optimizers leave, and checks of values."""
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function":
            continue
        check_only = isinstance(node.target, OpOverload) and not node.target._schema.returns and not node.users
        if check_only or any(mark in str(node.target) for mark in _PROFILER):
            graph.erase_node(node)


def _skip_identities(node: Node) -> Node:
    while node.op == "call_function" and node.target in _IDENTITIES:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _drop_identities(graph: torch.fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _IDENTITIES:
            node.replace_all_uses_with(_skip_identities(node))
            graph.erase_node(node)


def _name_inputs(
    graph: torch.fx.Graph,
    placeholders: Sequence[Node],
    variables: Sequence[Variable],
    feeds: Sequence[Feed],
    kept: set[str],
) -> None:
    names = [v.name for v in variables] + [f.name for f in feeds]
    for index, (placeholder, name) in enumerate(zip(placeholders, names, strict=True)):
        placeholder._rename(("feed_" if index >= len(variables) else "") + _identifier(name))
        # The tracer keeps the values of inputs it wrapped as tensors that require gradients; a graph has none.
        placeholder.meta["val"] = placeholder.meta["val"].detach()
    for placeholder, variable in zip(placeholders, variables, strict=False):
        if variable.name not in kept:
            graph.erase_node(placeholder)
    for node in graph.nodes:
        if node.op == "placeholder":
            node.target = node.name


def _identifier(name: str) -> str:
    word = "".join(c if c.isalnum() else "_" for c in name)
    return word if not word[:1].isdigit() else f"_{word}"


def label(graph: torch.fx.Graph, updates: Mapping[str, Node], owners: Mapping[str, str]) -> None:
    """Give every node its NodeInfo: scope, phase, variable, line and wishes.

    Optimizer hooks and autograd have said most phases. The others are decided by dataflow: a node outside every module
    that leads to updates, and not to a backward node, is part of the update.
    """
    origins: dict[Node, Origin] = {n: n.meta.get("custom", {}).get(ORIGIN, Origin()) for n in graph.nodes}
    to_update, to_backward = set(updates.values()), set()
    for node in reversed(list(graph.nodes)):
        for user in node.users:
            if user in to_update:
                to_update.add(node)
            if user.op != "output" and (user in to_backward or origins[user].phase is Phase.BACKWARD):
                to_backward.add(node)
    phases: dict[Node, Phase] = {}
    for node in graph.nodes:
        origin = origins[node]
        if node.target is operator.getitem:
            phases[node] = phases[node.args[0]]
        elif origin.phase is None or (origin.phase is Phase.UPDATE and node in to_backward and node not in to_update):
            updating = node in to_update and node not in to_backward and not origin.inside
            phases[node] = Phase.UPDATE if updating else Phase.FORWARD
        else:
            phases[node] = origin.phase
    served = _served(graph, updates, owners, phases)
    for node in graph.nodes:
        if node.op == "call_function":
            origin = origins[node.args[0] if node.target is operator.getitem else node]
            found = served[node]
            owner = "" if phases[node] is not Phase.UPDATE else next(iter(found)) if len(found) == 1 else "*"
            sequence = origin.sequence if phases[node] is not Phase.UPDATE else None
            node.meta[INFO] = NodeInfo(
                origin.scope,
                phases[node],
                owner,
                origin.line,
                device=origin.device,
                together=origin.together,
                sequence=sequence,
            )
    _give_sums_to_readers(graph)


def _give_sums_to_readers(graph: torch.fx.Graph) -> None:
    """A sum of gradients that a module adds to its own is counted to that module, and to the operator that reads it.

    Autograd adds up the gradients of a value when it has computed the last of them, which may be somewhere else: in a
    recurrence, in another layer. Sums that an update reads (those of a weight's gradients) stay where they were made.
    """
    summed: dict[Node, set[str]] = {}  # the scopes of what each sum adds
    for node in graph.nodes:
        if _is_sum(node):
            summed[node] = set().union(*(summed.get(a, {info(a).scope}) for a in node.all_input_nodes))
    given: set[Node] = set()
    for node in reversed(list(summed)):
        users = [user for user in node.users if user not in summed or user in given]
        readers = [info(user) for user in users if user.op == "call_function"]
        if not readers or {(known.scope, known.phase) for known in readers} != {(readers[0].scope, Phase.BACKWARD)}:
            continue
        if readers[0].scope in summed[node]:
            node.meta[INFO] = readers[0]
            given.add(node)


def _is_sum(node: Node) -> bool:
    """Whether a node adds two gradients."""
    nodes = [a for a in (node, *node.args) if isinstance(a, Node) and a.op == "call_function"]
    return node.target is aten.add.Tensor and len(nodes) == 3 and all(info(a).phase is Phase.BACKWARD for a in nodes)


def _served(
    graph: torch.fx.Graph, updates: Mapping[str, Node], owners: Mapping[str, str], phases: Mapping[Node, Phase]
) -> dict[Node, set[str]]:
    """The owners of the variables that each node leads to, through update nodes alone.

    The new weights of one network may feed the forward pass of another, as in an adversarial pair: that is no update.
    """
    served: dict[Node, set[str]] = {node: set() for node in graph.nodes}
    for name, node in updates.items():
        served[node].add(owners[name])
    for node in reversed(list(graph.nodes)):
        for user in node.users:
            if user.op != "output" and phases[user] is Phase.UPDATE:
                served[node] |= served[user]
    return served
