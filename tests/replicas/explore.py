"""Every state that a system of small scope can come to, by breadth-first search, and whether all its runs end well.

A system is what has `start()` and `moves(state)`. States are hashable. A move is a name, the state it leads to, and
whether it is a fault (something that may happen, but that nobody may count on).
"""

from __future__ import annotations

import gc
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

Name: TypeAlias = tuple[object, ...]  # its words; put together only when somebody has to read them


class Violation(Exception):
    """Something happened that must not."""


class System(Protocol):
    """What `explore` needs to know."""

    def start(self) -> Hashable:
        """The first state."""

    def moves(self, state: Hashable) -> Iterable[tuple[Name, Hashable, bool]]:
        """What can happen: its name, the state afterwards, whether it is a fault.

        Raises: Violation.
        """

    def ended_well(self, state: Hashable) -> str | None:
        """Of a state in which nothing but faults can happen: what is wrong with it, or None."""


@dataclass(frozen=True)
class Explored:
    """states, moves: how many. ends: in how many states nothing but faults can happen. depth: moves to the farthest."""

    states: int
    moves: int
    ends: int
    depth: int


@contextmanager
def _no_collector() -> Iterator[None]:
    """Nothing here is garbage, and looking for it takes a third of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_no_collector()
def explore(system: System, limit: int = 2_000_000) -> Explored:
    """Visit all states.

    All runs end, however moves are ordered, if the moves that are no faults form no cycle, and each end is a good one.
    That is stronger than progress under fair scheduling.

    Raises: Violation, with the moves that lead there.
    """
    start = system.start()
    number: dict[Hashable, int] = {start: 0}
    states: list[Hashable] = [start]
    came: list[tuple[int, Name]] = [(-1, ())]
    depth = [0]
    next_of: list[list[int]] = []
    moves = ends = 0
    while len(next_of) < len(states):
        here = len(next_of)
        onward = []
        try:
            for name, state, fault in system.moves(states[here]):
                moves += 1
                there = number.get(state)
                if there is None:
                    there = number[state] = len(states)
                    states.append(state)
                    came.append((here, name))
                    depth.append(depth[here] + 1)
                if not fault:
                    onward.append(there)
            if not onward:
                ends += 1
                if wrong := system.ended_well(states[here]):
                    raise Violation(wrong)
        except Violation as violation:
            raise Violation(f"{violation}\nafter\n{_path(here, came)}") from None
        next_of.append(onward)
        if len(states) > limit:
            raise Violation(f"more than {limit} states")
    _refuse_cycles(next_of, came)
    return Explored(len(states), moves, ends, max(depth))


def _path(here: int, came: list[tuple[int, Name]]) -> str:
    names: list[str] = []
    while here > 0:
        here, name = came[here]
        names.append("  " + " ".join(str(word) for word in name))
    return "\n".join(reversed(names)) or "  nothing"


def _refuse_cycles(next_of: list[list[int]], came: list[tuple[int, Name]]) -> None:
    """States are taken away when all that lead to them are gone; what stays lies on a cycle or behind one."""
    leads_here = [0] * len(next_of)
    for onward in next_of:
        for there in onward:
            leads_here[there] += 1
    free = [state for state, count in enumerate(leads_here) if count == 0]
    for state in free:
        for there in next_of[state]:
            leads_here[there] -= 1
            if leads_here[there] == 0:
                free.append(there)
    if len(free) < len(next_of):
        kept = next(state for state, count in enumerate(leads_here) if count)
        raise Violation(f"a run can go on for ever without getting anywhere, after\n{_path(kept, came)}")
