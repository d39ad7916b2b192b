"""Looking at tensors in flight: run a graph node by node and show the values as they appear."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from millrace.errors import NonFiniteError
from millrace.graph.graph import Graph, info

See = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Watch:
    """Whom to tell about which nodes: `pattern` is matched against node names and module scopes, shell style."""

    pattern: str
    see: See

    def matches(self, node: Node) -> bool:
        return fnmatch.fnmatchcase(node.name, self.pattern) or (
            bool(info(node).scope) and fnmatch.fnmatchcase(info(node).scope, self.pattern)
        )


class _Shown(Interpreter):
    def __init__(self, graph: Graph, see: Callable[[Node, Any], None]) -> None:
        super().__init__(graph.module)
        self._see = see

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function":
            self._see(n, value)
        return value


def _interpret(
    graph: Graph, variables: Sequence[Tensor], feeds: Sequence[Tensor], see: Callable[[Node, Any], None]
) -> list[Tensor]:
    """Run the functional graph as it is; returns fetches, then new values."""
    with torch.no_grad():
        return list(_Shown(graph, see).run(*variables, *feeds))


def run_watched(
    graph: Graph, variables: Sequence[Tensor], feeds: Sequence[Tensor], watches: Sequence[Watch]
) -> list[Tensor]:
    """Run the step with every watched tensor shown; updates are assigned at the end. Returns the fetches."""

    def see(node: Node, value: Any) -> None:
        for watch in watches:
            if isinstance(value, Tensor) and watch.matches(node):
                watch.see(node.name, value)

    results = _interpret(graph, variables, feeds, see)
    fetched = [value.clone() for value in results[: len(graph.fetches)]]
    by_name = {v.name: tensor for v, tensor in zip(graph.variables, variables, strict=True)}
    new = [value.clone() for value in results[len(graph.fetches) :]]
    for name, value in zip(graph.updates, new, strict=True):
        by_name[name].copy_(value)
    return fetched


def first_nonfinite(graph: Graph, variables: Sequence[Tensor], feeds: Sequence[Tensor]) -> str:
    """Which node of the step first makes a NaN or an infinity out of finite inputs, in words; "" if none does.

    Runs the step without assigning anything.
    """
    inputs = [*(v.name for v in graph.variables), *(f"feed {f.name!r}" for f in graph.feeds)]
    for name, tensor in zip(inputs, [*variables, *feeds], strict=True):
        if not _finite(tensor):
            return f"{name} is not finite to begin with ({_count(tensor)} of {tensor.numel()} values)"

    def see(node: Node, value: Any) -> None:
        # -inf is how attention masks say "never"; a node that only fills is not at fault.
        bad = isinstance(value, Tensor) and not _finite(value) and node.all_input_nodes
        if bad and (torch.isnan(value).any() or not _deliberate(node)):
            raise NonFiniteError(f"{describe(node)}: {_count(value)} of {value.numel()} values")

    try:
        _interpret(graph, variables, feeds, see)
    except NonFiniteError as error:
        return str(error)
    return ""


def failing_node(graph: Graph, variables: Sequence[Tensor], feeds: Sequence[Tensor]) -> str | None:
    """Which node raises on these inputs, in words; None when none does. Assigns nothing."""
    reached: list[Node] = []

    class Noting(Interpreter):
        def run_node(self, n: Node) -> Any:
            reached.append(n)
            return super().run_node(n)

    try:
        with torch.no_grad():
            Noting(graph.module).run(*variables, *feeds)
    except Exception:
        return describe(reached[-1])
    return None


def describe(node: Node) -> str:
    """A node, where in the model it is, and the user's line."""
    origin = info(node)
    place = "".join([f" in module {origin.scope!r}" if origin.scope else "", f", {origin.line}" if origin.line else ""])
    return f"node {node.name!r} ({node.target}, {origin.phase}{place})"


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _count(tensor: Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())


def _deliberate(node: Node) -> bool:
    """Whether a node passes on infinities that a mask put there."""
    return any(word in str(node.target) for word in ("masked_fill", "where", "full", "copy", "view", "expand", "add."))
