"""What every placement algorithm is."""

from __future__ import annotations

from typing import Protocol

from millrace.place.problem import Plan, Problem


class Algorithm(Protocol):
    """A search for a plan."""

    def __call__(self, problem: Problem, *, budget_s: float, seed: int) -> Plan:
        """A plan within about `budget_s` seconds; the same seed gives the same plan where time does not end the search.

        Raises: PlacementError when there is no plan that it can find (nothing fits, too many groups for it).
        """
        ...
