"""Looking at tensors in flight: run a graph node by node and show the values as they appear."""

from __future__ import annotations

import contextlib
import fnmatch
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import Interpreter, Node

from millrace.errors import StepError
from millrace.graph.graph import Graph, info
from millrace.runtime.aliasing import Memory
from millrace.runtime.out_of_memory import is_out_of_memory

See = Callable[[str, Tensor], None]
_USUAL_CAUSES = "\n  Usual causes: labels or indices out of range, or a batch unlike the first one."


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
    def __init__(self, graph: Graph, watches: Sequence[Watch], memory: Memory) -> None:
        super().__init__(graph.module)
        self._watches = watches
        self._memory = memory

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, Tensor):
            for watch in self._watches:
                if watch.matches(n):
                    # Whoever keeps a view of a variable must not find it changed by the next step.
                    watch.see(n.name, value.clone() if self._memory.holds(value) else value)
        return value


def run_watched(
    graph: Graph, variables: Sequence[Tensor], feeds: Sequence[Tensor], watches: Sequence[Watch]
) -> list[Tensor]:
    """Run the step with every watched tensor shown; updates are assigned at the end. Returns the fetches."""
    with torch.no_grad():
        results = _Shown(graph, watches, Memory(variables)).run(*variables, *feeds)
        # Some results are views of variables, or of each other's new values.
        results = [value.clone() for value in results]
        by_name = {v.name: tensor for v, tensor in zip(graph.variables, variables, strict=True)}
        for name, value in zip(graph.updates, results[len(graph.fetches) :], strict=True):
            by_name[name].copy_(value)
    return results[: len(graph.fetches)]


def first_nonfinite(graph: Graph, variables: Sequence[Tensor], feeds: Sequence[Tensor]) -> str:
    """Which node of the step first makes a NaN or an infinity out of finite inputs, in words; "" if none does.

    An infinity may be meant (the logarithm of a mask, or a mask that is an input), so the first node to make a NaN is
    named beside it. Runs the step without assigning anything.
    """
    inputs = [*(f"the feed {f.name!r}" for f in graph.feeds), *(f"the variable {v.name!r}" for v in graph.variables)]
    infinite = []
    for name, tensor in zip(inputs, [*feeds, *variables], strict=True):
        says = f"{name} is not finite to begin with ({_count(tensor)} of {tensor.numel()} values)"
        if _is_nan(tensor):
            return says
        if _is_infinite(tensor):
            infinite.append(says)
    search = _NonfiniteSearch(graph)
    search.search(variables, feeds)
    return "; then ".join([*infinite, *search.found])


class _Found(Exception):
    """Ends a search."""


class _NonfiniteSearch(Interpreter):
    """Runs a graph until the first node that makes a NaN; notes the first that makes an infinity on the way."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph.module)
        self.found: list[str] = []
        self._infinite: set[Node] = set()

    def search(self, variables: Sequence[Tensor], feeds: Sequence[Tensor]) -> None:
        with contextlib.suppress(_Found), torch.no_grad():
            self.run(*variables, *feeds)

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        parts = [part for part in pytree.tree_leaves(value) if isinstance(part, Tensor)]
        if n.op != "call_function":  # an input or a constant: it may be infinite, but nothing made it so here
            self._infinite |= {n} if any(map(_is_infinite, parts)) else set()
            return value
        for part in parts:
            if _is_nan(part):
                self.found.append(f"{describe(n)} makes {_count(part)} of {part.numel()} values NaN or infinite")
                raise _Found
        if any(_is_infinite(part) for part in parts):
            self._infinite.add(n)
            if not self.found and not self._passed_on(n):
                self.found.append(f"{describe(n)} makes {sum(map(_count, parts))} values infinite")
        return value

    def _passed_on(self, node: Node) -> bool:
        """Whether an infinity came in: from another node, or as a number in the program (a mask's -inf)."""
        constants = pytree.tree_leaves((node.args, node.kwargs))
        return any(n in self._infinite for n in node.all_input_nodes) or any(
            isinstance(c, float) and not math.isfinite(c) for c in constants
        )


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


def explained(error: Exception, graph: Graph, variables: Sequence[Tensor], feeds: Sequence[Tensor]) -> StepError | None:
    """What to raise for an error of PyTorch's in a step, naming the node. None when no node raises on these inputs."""
    where = failing_node(graph, variables, feeds)
    if where is None:
        return None
    causes = "" if is_out_of_memory(error) else _USUAL_CAUSES
    return StepError(f"the step failed at {where}.\n  PyTorch said: {error}{causes}")


def describe(node: Node) -> str:
    """A node, where in the model it is, and the user's line."""
    origin = info(node)
    place = "".join([f" in module {origin.scope!r}" if origin.scope else "", f", {origin.line}" if origin.line else ""])
    return f"node {node.name!r} ({node.target}, {origin.phase}{place})"


def _is_nan(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and bool(torch.isnan(tensor).any())


def _is_infinite(tensor: Tensor) -> bool:
    return (tensor.is_floating_point() or tensor.is_complex()) and bool(torch.isinf(tensor).any())


def _count(tensor: Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())
