"""From the nodes of each segment of a device to graphs that can be compiled and called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.utils._pytree as pytree
from torch.fx import Node

from millrace.graph.aliases import makes_memory
from millrace.graph.graph import Graph, feed_key, set_output, step_module
from millrace.graph.signature import Feed, TensorSpec
from millrace.graph.values import is_cheap, reads_of
from millrace.partition.program import ASSIGNED, KEPT, DeviceProgram, Edge, Instruction, Run, Segment, Send


@dataclass
class Outline:
    """What one device does, before the graphs of its segments are made.

    segments: the nodes of each. tasks: the names of the pieces in each. is_open: whether the last one can take more.
    """

    device: str
    segments: list[list[Node]] = field(default_factory=list)
    tasks: list[list[str]] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    is_open: bool = False

    def take(self, name: str, nodes: Sequence[Node]) -> None:
        """Put the nodes of a piece into the open segment, or a new one."""
        if not self.is_open:
            self.instructions.append(Run(len(self.segments)))
            self.segments.append([])
            self.tasks.append([])
            self.is_open = True
        self.segments[-1] += nodes
        self.tasks[-1].append(name)


def build(
    graph: Graph, outline: Outline, homes: Mapping[str, str], edges: Sequence[Edge], fetched: set[str]
) -> DeviceProgram:
    """The program of one device. Args: fetched: the values that it hands to the caller."""
    return _Builder(graph, outline, homes, edges, fetched).result()


class _Builder:
    def __init__(
        self, graph: Graph, outline: Outline, homes: Mapping[str, str], edges: Sequence[Edge], fetched: set[str]
    ) -> None:
        self._graph, self._outline, self._edges, self._fetched = graph, outline, edges, fetched
        inputs = graph.placeholders()
        self._variables = [v for v in graph.variables if homes[v.name] == outline.device]
        self._variable_of = {inputs[v.name]: v.name for v in self._variables}
        self._feed_of = {inputs[feed_key(f.name)]: feed_key(f.name) for f in graph.feeds}
        self._sent = {edge.value for edge in edges if edge.source == outline.device}
        self._reads = [reads_of(nodes) for nodes in outline.segments]
        self._made = {node for nodes in outline.segments for node in nodes}
        self._late = self._late_variables()
        self._wanted = self._values_wanted()
        before = fetched | {node.name for node in self._late.values() if node.op == "placeholder"}
        given = [n for n in graph.fx.nodes if n in self._variable_of or n.op == "get_attr"]
        self._early = [n for n in given if n.name in before]

    def result(self) -> DeviceProgram:
        segments = [
            self._segment(nodes, tasks)
            for nodes, tasks in zip(self._outline.segments, self._outline.tasks, strict=True)
        ]
        instructions = list(self._outline.instructions)
        if self._early:
            instructions.insert(0, Run(len(segments)))
            segments.append(self._segment([], [KEPT], handed=self._early))
        if self._late:
            instructions.append(Run(len(segments)))
            segments.append(self._assignments())
        return DeviceProgram(
            device=self._outline.device,
            variables=tuple(self._variables),
            feeds=tuple(dict.fromkeys(i for s in segments for i in s.inputs if i.startswith("feed:"))),
            segments=tuple(segments),
            instructions=_forgetting(instructions, segments, self._edges, self._fetched),
            fetches=tuple(sorted(self._fetched)),
            sent_variables={n.name: v for n, v in self._variable_of.items() if n.name in self._sent},
        )

    def _late_variables(self) -> dict[str, Node]:
        """Variables whose new value may be assigned only at the end of the step, and those values.

        A later segment still reads what the variable was, or the new value is not made here.
        """
        made_in = {node: index for index, nodes in enumerate(self._outline.segments) for node in nodes}
        last_read = {node: index for index, reads in enumerate(self._reads) for node in reads}
        late = {}
        for placeholder, variable in self._variable_of.items():
            if variable in self._graph.updates:
                new = self._graph.node(self._graph.updates[variable])
                if new not in made_in or made_in[new] < last_read.get(placeholder, -1):
                    late[variable] = new
        return late

    def _values_wanted(self) -> set[str]:
        """The values that somebody needs after the segment that makes them."""
        sent = self._sent - {node.name for node in self._variable_of}  # those are sent as they are
        here = {node.name for node in self._variable_of} | {node.name for node in self._feed_of}
        read = {node.name for reads in self._reads for node in reads} - here
        late = {node.name for node in self._late.values() if node not in self._feed_of}
        return sent | read | late | self._fetched

    def _segment(self, nodes: Sequence[Node], tasks: Sequence[str], handed: Sequence[Node] | None = None) -> Segment:
        outputs = [node for node in nodes if node.name in self._wanted] if handed is None else list(handed)
        made = set(nodes)
        updates = {
            variable: self._graph.node(self._graph.updates[variable])
            for variable in self._variable_of.values()
            if variable in self._graph.updates and variable not in self._late
        }
        return self._graph_of(nodes, outputs, {v: new for v, new in updates.items() if new in made}, tasks)

    def _assignments(self) -> Segment:
        return self._graph_of([], [], self._late, [ASSIGNED])

    def _graph_of(
        self, nodes: Sequence[Node], outputs: Sequence[Node], updates: Mapping[str, Node], tasks: Sequence[str]
    ) -> Segment:
        """A graph of `nodes`; what they read and do not make is a variable of this device, or a feed."""
        own = set(nodes)
        ends = [node for node in (*outputs, *updates.values()) if node not in own and node.op != "get_attr"]
        # A value that is assigned at the end was handed over by its segment, also where it is one of the variables.
        handed = {n for n in updates.values() if n not in own}
        read = dict.fromkeys([*reads_of(nodes), *ends])
        variables = [
            v
            for placeholder, v in zip(self._variable_of, self._variables, strict=True)
            if (placeholder in read and placeholder not in handed) or v.name in updates
        ]
        fed = [node for node in read if node in handed or node not in self._variable_of]
        fx = torch.fx.Graph()
        copies: dict[Node, Node] = {}
        inputs = self._graph.placeholders()
        own_inputs = {v.name: _input(fx, inputs[v.name]) for v in variables}
        copies |= {inputs[name]: copy for name, copy in own_inputs.items()}
        copies |= {node: _input(fx, node) for node in fed}

        def bring(node: Node) -> Node:
            if node not in copies:
                if node.op != "get_attr":
                    assert node in own or is_cheap(node), node
                    for argument in node.all_input_nodes:
                        bring(argument)
                copies[node] = fx.node_copy(node, lambda n: copies[n])
                copies[node].meta = dict(node.meta)
            return copies[node]

        for node in nodes:
            bring(node)
        results = {node.name: bring(node) for node in outputs}
        new_values = {variable: bring(node) for variable, node in updates.items()}
        set_output(fx, [*results.values(), *new_values.values()])
        fx.eliminate_dead_code()
        names = [self._feed_of.get(node, node.name) for node in fed]
        whole = Graph(
            module=step_module(self._graph.module, fx),
            # Other blocks of the same variable may be elsewhere.
            variables=tuple(replace(v, part=None) for v in variables),
            feeds=tuple(Feed(n, TensorSpec.of(node.meta["val"])) for n, node in zip(names, fed, strict=True)),
            fetches={value: node.name for value, node in results.items()},
            updates={variable: node.name for variable, node in new_values.items()},
            feed_tree=pytree.treespec_dumps(pytree.tree_structure(tuple(range(len(fed))))),
        )
        return Segment(whole, tuple(names), tuple(tasks), tuple(n.name for n in fed if self._is_writable(n, own)))

    def _is_writable(self, node: Node, own: set[Node]) -> bool:
        """Whether only the segment of these nodes has a value. What was received lies in the transport's memory."""
        return node in self._made and makes_memory(node) and own.issuperset(node.users)


def _input(fx: torch.fx.Graph, node: Node) -> Node:
    copy = fx.placeholder(node.name)
    copy.target = copy.name  # a variable may come in twice: as it is, and as what another one was
    copy.meta = dict(node.meta)
    return copy


def _forgetting(
    instructions: Sequence[Instruction], segments: Sequence[Segment], edges: Sequence[Edge], fetched: Iterable[str]
) -> tuple[Instruction, ...]:
    """The instructions, each run with the values that nothing after it needs."""
    kept = set(fetched)
    result: list[Instruction] = []
    for instruction in reversed(instructions):
        if isinstance(instruction, Run):
            segment = segments[instruction.segment]
            held = [i for i in segment.inputs if not i.startswith("feed:")]
            last = [value for value in dict.fromkeys((*held, *segment.outputs)) if value not in kept]
            kept.update(held)
            instruction = Run(instruction.segment, tuple(last))
        elif isinstance(instruction, Send):
            kept.add(edges[instruction.edge].value)
        result.append(instruction)
    return tuple(reversed(result))
