"""A graph as text that a person can read: what `print(graph)` shows."""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from millrace.graph.encoding import attribute
from millrace.graph.graph import Graph, info
from millrace.graph.scopes import SHARED
from millrace.graph.signature import Phase, Role, TensorSpec, Variable, short_dtype
from millrace.graph.sizes import human_bytes

_SHOWN_VALUES = 8  # a constant of at most so many elements is shown in full
_TITLES = {
    Role.PARAMETER: "parameters",
    Role.BUFFER: "buffers",
    Role.OPTIMIZER: "optimizer state",
    Role.STEP: "step counter",
    Role.RANDOM: "random stream",
    Role.TENSOR: "tensors",
}


def to_text(graph: Graph, *, lines: bool = False) -> str:
    """The whole graph as text: variables, feeds, one line per node under headings of phase and module, results.

    `%name` is a node; variables and feeds stand under their own names. The same graph gives the same text.

    Args:
        lines: add the user's source line to every node.
    """
    printer = _Printer(graph, lines)
    return "\n".join(itertools.chain(_header(graph), _inputs(graph), printer.body(), _results(graph, printer.names)))


def _header(graph: Graph) -> Iterator[str]:
    phases = Counter(info(n).phase for n in graph.nodes)
    counts = ", ".join(f"{phases[p]} {p}" for p in Phase if phases[p]) or "none"
    yield f"graph of {len(graph.nodes)} nodes: {counts}"
    yield f"variables: {len(graph.variables)}, {_total(v.spec for v in graph.variables)} on {_home(graph)}"


def _home(graph: Graph) -> str:
    """The device of most inputs; values elsewhere say where they are."""
    devices = Counter([v.spec.device for v in graph.variables] + [f.spec.device for f in graph.feeds])
    return devices.most_common(1)[0][0] if devices else "cpu"


def _total(specs: Iterable[TensorSpec]) -> str:
    return human_bytes(sum(s.size_bytes for s in specs))


def _inputs(graph: Graph) -> Iterator[str]:
    home = _home(graph)
    for role in Role:
        members = [v for v in graph.variables if v.role is role]
        if members:
            yield f"\n{_TITLES[role]}: {len(members)}, {_total(v.spec for v in members)}"
            yield from _table([(v.name, _spec(v.spec, home), _fate(graph, v)) for v in members])
    if graph.feeds:
        yield f"\nfeeds: {len(graph.feeds)}, {_total(f.spec for f in graph.feeds)}"
        yield from _table([(f"feed:{f.name}", _spec(f.spec, home), "") for f in graph.feeds])


def _fate(graph: Graph, variable: Variable) -> str:
    return "updated" if variable.name in graph.updates else ""


def _table(rows: list[tuple[str, str, str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, spec, note in rows:
        yield f"  {name:{widths[0]}}  {spec:{widths[1]}}  {note}".rstrip()


def _results(graph: Graph, names: Mapping[Node, str]) -> Iterator[str]:
    shown = {node.name: names[node] for node in graph.fx.nodes if node in names}
    for title, results in (("fetches", graph.fetches), ("updates", graph.updates)):
        if results:
            yield f"\n{title}"
            yield from (f"  {name} = {shown[node]}" for name, node in results.items())


class _Printer:
    """Prints the nodes of one graph module; one per subgraph."""

    def __init__(self, graph: Graph, lines: bool) -> None:
        self.graph = graph
        self.lines = lines
        self.home = _home(graph)
        self.names = {n: f"%{n.name}" for n in graph.fx.nodes if n.op != "output"}
        self.names |= {node: name for name, node in graph.placeholders().items()}
        self.updated: dict[str, list[str]] = {}
        for variable, node in graph.updates.items():
            self.updated.setdefault(node, []).append(variable)

    def body(self) -> Iterator[str]:
        """Constants, then nodes under a heading for every change of phase or module."""
        constants = list(self.constants(self.graph.module, "  "))
        if constants:
            yield "\nconstants"
            yield from constants
        heading = ""
        for node in self.graph.nodes:
            now = _heading(node)
            if now != heading:
                yield f"\n{now}"
                heading = now
            yield from self.node(node, self.graph.module, "  ")

    def constants(self, module: GraphModule, indent: str) -> Iterator[str]:
        for node in module.graph.find_nodes(op="get_attr"):
            value = attribute(module, str(node.target))
            if isinstance(value, Tensor):
                self.names[node] = f"%{node.name}"
                shown = f" = {value.tolist()}" if value.numel() <= _SHOWN_VALUES else ""
                yield f"{indent}%{node.name} : {_spec(TensorSpec.of(value), self.home)}{shown}"

    def node(self, node: Node, module: GraphModule, indent: str) -> Iterator[str]:
        """The node's line, and below it the subgraphs that it runs."""
        arrow = "".join(f"  -> {v}" for v in self.updated.get(node.name, ())) if module is self.graph.module else ""
        marks = _marks(node) + (f"  # {info(node).line}" if self.lines and info(node).line else "")
        yield f"{indent}%{node.name} = {self.call(node)}  : {self.value(node.meta.get('val'))}{arrow}{marks}"
        for argument in node.all_input_nodes:
            if argument.op == "get_attr":
                inner = attribute(module, str(argument.target))
                if isinstance(inner, GraphModule):
                    yield from self.subgraph(argument.name, inner, indent + "    ")

    def subgraph(self, name: str, module: GraphModule, indent: str) -> Iterator[str]:
        inputs = module.graph.find_nodes(op="placeholder")
        self.names |= {n: f"%{n.name}" for n in module.graph.nodes}
        listed = ", ".join(f"%{n.name}: {self.value(n.meta.get('val'))}" for n in inputs)
        yield f"{indent}{name}({listed})"
        yield from self.constants(module, indent + "  ")
        for node in module.graph.nodes:
            if node.op == "call_function":
                yield from self.node(node, module, indent + "  ")
            elif node.op == "output":
                yield f"{indent}  return {self.argument(node.args[0])}"

    def call(self, node: Node) -> str:
        if node.target is operator.getitem:
            return f"{self.argument(node.args[0])}[{self.argument(node.args[1])}]"
        parts = [self.argument(a) for a in node.args]
        parts += [f"{k}={self.argument(v)}" for k, v in node.kwargs.items() if k != "pin_memory" or v]
        return f"{operator_label(node.target)}({', '.join(parts)})"

    def argument(self, value: Any) -> str:
        if isinstance(value, Node):
            return self.names.get(value, f"%{value.name}")
        if isinstance(value, tuple | list):
            inside = ", ".join(self.argument(v) for v in value)
            if isinstance(value, tuple):
                return f"({inside},)" if len(value) == 1 else f"({inside})"
            return f"[{inside}]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k}: {self.argument(v)}" for k, v in value.items()) + "}"
        if isinstance(value, torch.dtype):
            return short_dtype(value)
        if isinstance(value, OpOverload):
            return operator_label(value)
        if isinstance(value, torch.device | torch.layout | torch.memory_format):
            return str(value).removeprefix("torch.")
        return repr(value)

    def value(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return _spec(TensorSpec.of(value), self.home)
        if isinstance(value, tuple | list):
            return "(" + ", ".join(self.value(v) for v in value) + ")"
        return repr(value)


def operator_label(target: Any) -> str:
    """The short name of an operator: ATen without its namespace, the overload only where it is not the default."""
    if isinstance(target, OpOverload):
        return str(target).removeprefix("aten.").removesuffix(".default")
    name = getattr(target, "name", None)
    return name() if callable(name) else getattr(target, "__name__", str(target))


def _marks(node: Node) -> str:
    """The block of a node, and what model code says of where it is to be."""
    known = info(node)
    block = "" if known.block is None else f"  | block {known.block}"
    device = f"  | on {known.device.name}" if known.device and known.device.name else ""
    return block + device + (f"  | with {known.together.name}" if known.together and known.together.name else "")


def _heading(node: Node) -> str:
    known = info(node)
    owner = known.variable.replace(SHARED, "(shared)") if known.phase is Phase.UPDATE else known.scope
    if known.phase is Phase.UPDATE and known.block is not None:
        owner = owner.rpartition("[")[0] or owner  # blocks of one variable stand under one heading
    return f"{known.phase} {owner}".rstrip()


def _spec(spec: TensorSpec, home: str) -> str:
    return str(spec) if spec.device == home else f"{spec} on {spec.device}"


Graph.printer = to_text
