"""A step in two halves: one makes the gradients of a batch, the other applies them.

Replicas of a step agree in between: each runs the first half on a slice of the batch, and the second sees the mean of
what they found. One after the other on the same variables, the halves are the step, bit for bit.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch._ops import OpOverload
from torch.fx import Node

from millrace.errors import SettingError
from millrace.graph.graph import Graph, feed_key, info, spec_of
from millrace.graph.passes.extract import ancestors, extract
from millrace.graph.signature import Feed, Phase, Role, TensorSpec


@dataclass(frozen=True)
class Halves:
    """The two halves of a step, and what goes from one to the other.

    gradients: forward and backward. Fetches: those of the step that do not need the update, and every exchanged value.
        Updates: what the forward pass itself changes (the statistics of BatchNorm, the random stream).
    update: its feeds are the exchanged values (a batch is a dict of them by name). It reads and updates parameters,
        optimizer slots and step counters. Fetches: those of the step that are made by the update.
    exchanged: in the order of the parameters. A gradient is called "gradient/<parameter>". A value that is not floating
        is the same for every batch.
    """

    gradients: Graph
    update: Graph
    exchanged: tuple[Feed, ...]


def halves(graph: Graph) -> Halves:
    """Cut a step between its backward pass and its update.

    What both need and no batch has a part in (constants, a cast weight) is made in both. A fetched exchanged value may
    be a view, or have several elements at one place in memory. `gradients` can be traced for another batch if `graph`
    can, and then exchanges values of the same names and shapes.

    Raises: SettingError, naming node and line, for a step that goes on computing with new weights, and for one whose
        update reads numbers of the batch that have no mean (integers, or one value for every example).
    """
    return _Cut(graph).result()


class _Cut:
    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._inputs = graph.placeholders()
        by_name = {node.name: node for node in graph.fx.nodes}
        self._fetches = {name: by_name[node] for name, node in graph.fetches.items()}
        self._updates = {name: by_name[node] for name, node in graph.updates.items()}
        self._feeds = {self._inputs[feed_key(feed.name)] for feed in graph.feeds}
        self._first = self._first_nodes()
        self._changed = {n for n, node in self._updates.items() if node in self._first or node in self._feeds}
        self._free = self._free_nodes()
        self._refuse_new_weights()

    def result(self) -> Halves:
        graph = self._graph
        second = {
            n: node for n, node in self._fetches.items() if node.op == "call_function" and node not in self._first
        }
        updates = {name: node for name, node in self._updates.items() if name not in self._changed}
        exchanged = self._named(self._crossing([*second.values(), *updates.values()]))
        fetches = {name: node for name, node in self._fetches.items() if name not in second}
        gradients = extract(
            graph,
            fetches | {feed.name: node for feed, node in exchanged.items()},
            {name: node for name, node in self._updates.items() if name in self._changed},
        )
        if graph.retrace is not None:
            gradients = gradients.with_(retrace=lambda batch: _again(graph, batch, tuple(exchanged)))
        return Halves(gradients, extract(graph, second, updates, exchanged), tuple(exchanged))

    # -- which node is in which half -----------------------------------------------------------------------------

    def _first_nodes(self) -> set[Node]:
        """Forward and backward, and what counts the random numbers that they draw.

        A view is where its source is: the part of a gradient that a block of a split parameter takes is made before it
        travels, and a fetched view of a parameter shows what the update has left.
        """
        first = {n for n in self._graph.nodes if info(n).phase is not Phase.UPDATE}
        for variable in self._graph.variables:
            if variable.role is Role.RANDOM and variable.name in self._updates:
                drawn = self._inputs[variable.name]
                if any(user in first for user in drawn.users):
                    first |= {n for n in ancestors([self._updates[variable.name]]) if n.op == "call_function"}
        for node in self._graph.nodes:
            source = _viewed(node)
            if source is not None and source.op == "call_function":
                (first.add if source in first else first.discard)(node)
        return first

    def _free_nodes(self) -> set[Node]:
        """Those whose value is the same in both halves: made of constants and of variables that the first leaves alone.

        Gradients are not among them, so that each has its name and its way.
        """
        changed = {self._inputs[name] for name in self._changed}
        free: set[Node] = set()
        for node in self._graph.fx.nodes:
            if node.op == "placeholder":
                is_free = node not in changed and node not in self._feeds
            else:
                is_free = info(node).phase is not Phase.BACKWARD and free.issuperset(node.all_input_nodes)
            if is_free and node.op != "output":
                free.add(node)
        return free

    def _varying(self) -> set[Node]:
        """Those whose value is another for another batch, or another stream of random numbers."""
        drawn = {self._inputs[v.name] for v in self._graph.variables if v.role is Role.RANDOM}
        sources, before = self._feeds | drawn, set[Node]()
        while sources != before:
            before, varying = sources, set(sources)
            for node in self._graph.nodes:
                if not varying.isdisjoint(node.all_input_nodes):
                    varying.add(node)
            sources = sources | {self._inputs[name] for name in self._changed if self._updates[name] in varying}
        return varying

    def _refuse_new_weights(self) -> None:
        known = self._first | self._free
        for node in self._graph.nodes:
            late = [a for a in node.all_input_nodes if a.op == "call_function" and a not in known]
            if node in self._first and late:
                raise SettingError(
                    f"{_called(node)} reads {_called(late[0])}, which an optimizer has already changed. A step that "
                    "goes on computing with new weights (as adversarial pairs do) has no two halves, and so no "
                    "replicas: take all gradients before the first update, or train without replicas."
                )

    # -- what is exchanged ---------------------------------------------------------------------------------------

    def _crossing(self, results: Iterable[Node]) -> list[tuple[Node, list[Node]]]:
        """The values of the first half that the second reads, in order, each with its readers."""
        read: dict[Node, list[Node]] = {}
        seen: set[Node] = set()
        waiting: list[tuple[Node, Node | None]] = [(node, None) for node in results]
        while waiting:
            node, reader = waiting.pop()
            if node not in self._free and (node in self._first or node.op == "placeholder"):
                read.setdefault(node, []).extend([reader] if reader is not None else [])
            elif node not in seen:
                seen.add(node)
                waiting += [(argument, node) for argument in node.all_input_nodes]
        # What is made of other exchanged values alone (split ones joined, for a norm) is made again, of their means.
        known = set(read) | self._free
        made = {n for n in read if known.issuperset(n.all_input_nodes) and not self._free.issuperset(n.all_input_nodes)}
        return [(node, read[node]) for node in self._graph.fx.nodes if node in read and node not in made]

    def _named(self, crossing: list[tuple[Node, list[Node]]]) -> dict[Feed, Node]:
        known = {node: name for name, node in reversed(self._fetches.items()) if name.startswith("gradient/")}
        names, varying = set(self._fetches), self._varying()
        found: dict[Feed, Node] = {}
        for node, readers in crossing:
            spec = spec_of(node)
            assert spec is not None, "what an update reads is one tensor"
            if node in varying and not (spec.dtype.is_floating_point or spec.dtype.is_complex):
                reader = f"{_called(readers[0])} in the update" if readers else "the update"
                raise SettingError(
                    f"{reader} reads {_called(node)} ({spec}), which depends on the batch and is not floating, so "
                    "that replicas cannot take a mean of it. Compute with it in the model's forward pass, or give the "
                    "update a floating value."
                )
            name = known.get(node) or next(n for n in self._candidates(node, spec, readers) if n not in names)
            names.add(name)
            found[Feed(name, spec)] = node
        order = {f"gradient/{v.name}": position for position, v in enumerate(self._graph.variables)}
        # Not the order in which they are made, which may be another one for another batch.
        return dict(sorted(found.items(), key=lambda pair: (order.get(pair[0].name, len(order)), pair[0].name)))

    def _candidates(self, node: Node, spec: TensorSpec, readers: Iterable[Node]) -> Iterator[str]:
        """Names that are the same when the step is traced for another batch."""
        served = {info(reader).variable for reader in readers} - {"*"}
        owner = next(iter(served)) if len(served) == 1 else "*"
        shapes = {v.name: v.spec.shape for v in self._graph.variables}
        source = node
        while info(source).phase is Phase.UPDATE and (viewed := _viewed(source)) is not None:
            source = viewed
        if info(source).phase is Phase.BACKWARD and shapes.get(owner) == spec.shape:
            yield f"gradient/{owner}"
        yield f"exchanged/{owner}"
        for count in range(1, len(self._graph.nodes) + 1):
            yield f"exchanged/{owner}/{count}"


def _again(graph: Graph, batch: Any, expected: tuple[Feed, ...]) -> Graph:
    assert graph.retrace is not None
    found = halves(graph.retrace(batch))
    if found.exchanged != expected:
        before, now = _listed(expected), _listed(found.exchanged)
        changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        name = changed[0]
        raise SettingError(
            f"for another batch the update reads other values: {name!r} was {before.get(name, 'not there')} and is "
            f"{now.get(name, 'not there')}. An update cannot read a value for every example of a batch that replicas "
            "divide; take its mean in the model's forward pass."
        )
    return found.gradients


def _viewed(node: Node) -> Node | None:
    """What the node shows a part of or in another shape; None for a node that computes."""
    target = node.target
    is_view = target is operator.getitem or (isinstance(target, OpOverload) and target.is_view)
    return node.all_input_nodes[0] if is_view and len(node.all_input_nodes) == 1 else None


def _listed(feeds: Iterable[Feed]) -> Mapping[str, str]:
    return {feed.name: str(feed.spec) for feed in feeds}


def _called(node: Node) -> str:
    """The node's name and line, for a message."""
    line = info(node).line
    return f"{node.name!r} ({line})" if line else f"{node.name!r}"
