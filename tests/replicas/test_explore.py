"""The search itself: it sees every state, and finds what it is there to find."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest
from tests.replicas.explore import Explored, Name, Violation, explore


@dataclass(frozen=True)
class Arrows:
    """States are letters, and arrows lead to the next; a capital letter is a bad end. `!`: reached by a fault."""

    arrows: Mapping[str, str]

    def start(self) -> str:
        return "a"

    def moves(self, state: str) -> Iterator[tuple[Name, str, bool]]:
        for onward in self.arrows.get(state, "").split():
            if onward == "forbidden":
                raise Violation("forbidden")
            yield ("to", onward[0]), onward[0], onward.endswith("!")

    def ended_well(self, state: str) -> str | None:
        return "a bad end" if state.isupper() else None


def test_all_states_moves_and_ends_are_counted() -> None:
    assert explore(Arrows({"a": "b c", "b": "d", "c": "d e"})) == Explored(states=5, moves=5, ends=2, depth=2)


def test_the_shortest_way_to_a_violation_is_told() -> None:
    with pytest.raises(Violation, match=r"(?s)forbidden\nafter\n  to c\n  to d$"):
        explore(Arrows({"a": "b c", "b": "x", "x": "d", "c": "d", "d": "forbidden"}))


def test_a_bad_end_is_found() -> None:
    with pytest.raises(Violation, match=r"(?s)a bad end.*to b\n  to C"):
        explore(Arrows({"a": "b", "b": "C"}))


def test_nobody_may_count_on_a_fault() -> None:
    with pytest.raises(Violation, match="a bad end"):
        explore(Arrows({"a": "B", "B": "c!"}))


def test_what_goes_round_for_ever_is_found() -> None:
    with pytest.raises(Violation, match=r"(?s)for ever.*to b"):
        explore(Arrows({"a": "b d", "b": "c", "c": "b d"}))


def test_a_circle_of_faults_ends_as_nobody_counts_on_them() -> None:
    assert explore(Arrows({"a": "b!", "b": "a"})).states == 2
