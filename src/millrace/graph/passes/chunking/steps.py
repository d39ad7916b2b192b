"""Which nodes stand once for every step of time: a recurrence that was written out while it was traced.

In such a loop the same operators come again and again, in the order in which they were traced, and what comes last
depends on what came first. Nodes of a module are counted: the operator that comes again after the longest way tells one
step from the next.
"""

from __future__ import annotations

import bisect
import itertools
import operator
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node

from millrace.graph.graph import Graph, info
from millrace.graph.passes.splitting.values import even
from millrace.graph.scopes import modules_of, scope_of
from millrace.graph.signature import Phase
from millrace.graph.values import is_cheap


@dataclass(frozen=True)
class _Loop:
    """A loop in the forward pass of one module.

    steps: the nodes of each step. starts: the sequence number with which each begins. closed: whether a step depends on
    earlier ones.
    """

    steps: tuple[tuple[Node, ...], ...]
    starts: tuple[int, ...]
    closed: bool


def chunks_of_steps(graph: Graph, chunks: int) -> dict[Node, int]:
    """The chunk of every node of a step of time; backward nodes are of the step that they are the gradient of.

    A module that is called in every step, but does not depend on its earlier calls itself (a layer that makes words of
    states), is counted in where another one of as many steps does.

    Args: chunks: loops of fewer steps are left alone.
    """
    members: dict[tuple[str, Phase], list[Node]] = {}
    for node, (module, _) in modules_of(graph, _module).items():
        if node.target is not operator.getitem and not is_cheap(node):
            members.setdefault((module, info(node).phase), []).append(node)
    loops = {
        module: loop
        for (module, phase), nodes in members.items()
        if phase is Phase.FORWARD and (loop := _loop(nodes, chunks)) is not None
    }
    lengths = {len(loop.steps) for loop in loops.values() if loop.closed}
    found: dict[Node, int] = {}
    for module, loop in loops.items():
        if len(loop.steps) not in lengths:
            continue
        bounds = even(len(loop.steps), chunks, 0).bounds
        for step, nodes in enumerate(loop.steps):
            found |= dict.fromkeys(nodes, bisect.bisect_right(bounds, step) - 1)
        last = info(loop.steps[-1][-1]).sequence
        for node in members.get((module, Phase.BACKWARD), []):
            number = info(node).sequence
            if number is not None and last is not None and loop.starts[0] <= number <= last:
                step = bisect.bisect_right(loop.starts, number) - 1
                found[node] = bisect.bisect_right(bounds, step) - 1
    return found


def _loop(nodes: Sequence[Node], least: int) -> _Loop | None:
    """The loop that these nodes of one module are, if they are one of at least so many steps."""
    keys = [_key(node) for node in nodes]
    places: dict[object, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    often = [found for found in places.values() if len(found) >= max(least, 2)]
    if not often:
        return None
    tells = max(often, key=lambda found: (_gap(found), -found[0]))
    length = _gap(tells)
    before = 0  # how many nodes of a step come before the one that tells it
    while before < min(length - 1, tells[0]) and len({keys[place - before - 1] for place in tells}) == 1:
        before += 1
    starts = [place - before for place in tells]
    ends = [*starts[1:], min(starts[-1] + length, len(nodes))]
    steps = tuple(tuple(nodes[start:end]) for start, end in zip(starts, ends, strict=True))
    numbers = [info(step[0]).sequence for step in steps]
    if None in numbers:
        return None
    return _Loop(steps, tuple(n for n in numbers if n is not None), _depends(steps[-1], steps[0]))


def _module(node: Node) -> str:
    scope, block = scope_of(node), info(node).block
    return scope if block is None else f"{scope}.block {block}"


def _key(node: Node) -> object:
    value = node.meta.get("val")
    return node.target, info(node).line, tuple(value.shape) if isinstance(value, Tensor) else None


def _gap(places: Sequence[int]) -> int:
    """How far it usually is from one place to the next."""
    return int(statistics.median_low(b - a for a, b in itertools.pairwise(places)))


def _depends(later: Sequence[Node], earlier: Sequence[Node]) -> bool:
    targets, seen = set(earlier), set(later)
    waiting = list(later)
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source in targets:
                return True
            if source not in seen and info(source).phase is info(later[0]).phase:
                seen.add(source)
                waiting.append(source)
    return False
