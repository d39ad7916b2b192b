"""Changes of a placement that a search tries."""

from __future__ import annotations

import numpy as np

from millrace.place.devices import pipeline_order
from millrace.place.problem import Ints, Problem
from millrace.place.tables import tables

_LONGEST_RUN = 6


class Moves:
    """Draws changes: one group elsewhere, two groups exchanged, a group to a neighbour, a run of groups to its end's.

    The last two keep together what exchanges tensors, and shift the borders of pipeline stages.
    """

    def __init__(self, problem: Problem) -> None:
        allowed_GD = tables(problem).allowed_GD
        self._allowed = [np.flatnonzero(row).tolist() for row in allowed_GD]
        self._may = allowed_GD.tolist()
        self.movable = [g for g, devices in enumerate(self._allowed) if len(devices) > 1]
        self._row = pipeline_order(problem).tolist()
        self._place = {g: i for i, g in enumerate(self._row)}
        source_G = problem.group_T[np.repeat(problem.producer_K, np.diff(problem.first_use_K1))]
        target_G = problem.group_T[problem.uses_C]
        self._neighbours: list[set[int]] = [set() for _ in range(problem.groups)]
        for source, target in zip(source_G.tolist(), target_G.tolist(), strict=True):
            if source != target:
                self._neighbours[source].add(target)
                self._neighbours[target].add(source)
        self._near = [sorted(groups) for groups in self._neighbours]

    def draw(self, device_G: Ints, random: np.random.Generator) -> tuple[Ints, list[int]]:
        """A changed copy of a placement, and the groups that moved; none of them when the draw changes nothing."""
        kind, where, which, length = random.random(4).tolist()
        group = self.movable[int(where * len(self.movable))]
        changed = device_G.copy()
        if kind < 0.35:
            return changed, self._put(changed, [group], _pick(self._allowed[group], which))
        if kind < 0.55:
            other = _pick(self.movable, which)
            one, two = int(device_G[group]), int(device_G[other])
            if one == two or not (self._may[group][two] and self._may[other][one]):
                return changed, []
            changed[group], changed[other] = two, one
            return changed, [group, other]
        if kind < 0.75 and self._near[group]:
            return changed, self._put(changed, [group], int(device_G[_pick(self._near[group], which)]))
        first = self._place[group]
        run = self._row[first : first + 1 + int(length * _LONGEST_RUN)]
        edge = first - 1 if which < 0.5 else first + len(run)
        if not 0 <= edge < len(self._row):
            return changed, []
        return changed, self._put(changed, run, int(device_G[self._row[edge]]))

    def _put(self, changed: Ints, groups: list[int], device: int) -> list[int]:
        moved = [g for g in groups if self._may[g][device] and changed[g] != device]
        changed[moved] = device
        return moved


def _pick(items: list[int], fraction: float) -> int:
    return items[int(fraction * len(items))]
