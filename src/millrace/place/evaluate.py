"""Step time and memory of many plans that differ in a few groups: the numbers of `simulate.py`, fast.

A search holds one order of tasks and one base placement. A trial that moves some groups is walked only from the first
task on that the move can touch; the state of the walk at every so many positions is kept for that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from millrace.place.problem import Floats, Ints, Plan, Problem
from millrace.place.tables import tables
from millrace.place.walk import peak_bytes, walk

_SNAPSHOTS = 32


@dataclass(frozen=True)
class Score:
    """What a trial comes to. over_bytes: what all devices lack in memory."""

    step_s: float
    over_bytes: float


class Evaluator:
    """Scores placements for one order of tasks.

    `reset` sets order and base placement; `trial` scores another placement; `accept` makes it the new base.
    """

    def __init__(self, problem: Problem) -> None:
        assert problem.devices <= 62, "the devices that a tensor reaches are kept in the bits of one integer"
        self.problem = problem
        made = tables(problem)
        T, D = problem.tasks, problem.devices
        wires = int(problem.wire_DD.max(initial=-1)) + 1
        state = 3 * D + wires
        self._stride = max(T // _SNAPSHOTS, 1)
        rows = -(-T // self._stride) + 1
        self._seconds_TD = np.ascontiguousarray(problem.seconds_TD)
        self._seconds_GD = made.seconds_GD
        self._made = (made.first_made_T1, made.made_K, problem.bytes_K, problem.first_use_K1, problem.uses_C)
        self._links = (problem.latency_s_DD, problem.bytes_per_s_DD, problem.wire_DD)
        self._ready_T, self._end_P, self._hold_P, self._free_P = (np.zeros(T) for _ in range(4))
        self._state = np.zeros(state)
        self._sent = np.zeros((len(problem.producer_K) * max(D - 1, 1), 4))
        self._counts = np.zeros(1, dtype=np.int64)
        self._snapshots = (
            np.zeros((rows, T)),
            np.zeros((rows, T)),
            np.zeros((rows, T)),
            np.zeros((rows, state)),
            np.zeros(rows, dtype=np.int64),
        )
        self._base_end_P, self._base_sent = np.zeros(T), np.zeros_like(self._sent)
        self._tail_T = _tails(problem)
        self._all_G, self._no_load_D = np.arange(problem.groups), np.zeros(D)
        self._scratch = float(problem.scratch_bytes_T.max(initial=0.0))
        self._resident_G = np.ascontiguousarray(problem.resident_bytes_G)
        self.order_T: Ints = np.arange(T)
        self.device_G: Ints = np.zeros(problem.groups, dtype=np.int64)
        self._device_T: Ints = np.zeros(T, dtype=np.int64)

    def reset(self, device_G: Ints, order_T: Ints) -> Score:
        """Take an order and a base placement, and score them."""
        self.order_T = np.ascontiguousarray(order_T, dtype=np.int64)
        self._position_T = np.empty(self.problem.tasks, dtype=np.int64)
        self._position_T[self.order_T] = np.arange(self.problem.tasks)
        self._touched_G = self._first_touched()
        self.device_G = np.array(device_G, dtype=np.int64)
        return self._base_walk(0)

    def trial(self, device_G: Ints, moved: list[int], limit_s: float = np.inf) -> Score:
        """Score a placement that differs from the base in the groups `moved` (at most).

        limit_s: a step known to take longer is scored infinite, early.
        """
        self._place(device_G, moved)
        begin = self._restore(min(int(self._touched_G[g]) for g in moved))
        score = self._walk(begin, limit_s, device_G, keep=False)
        self._place(self.device_G, moved)
        return score

    def accept(self, device_G: Ints, moved: list[int]) -> Score:
        """Make a placement that differs from the base in the groups `moved` the new base."""
        self.device_G = np.array(device_G, dtype=np.int64)
        return self._base_walk(min(int(self._touched_G[g]) for g in moved))

    def peak_bytes(self) -> Floats:
        """The most memory of each device in the base: [D]."""
        self._base_walk(0)
        return self._peaks(self._resident(self.device_G))

    def plan(self, algorithm: str = "", note: str = "") -> Plan:
        """The base as a plan."""
        return Plan(self.device_G.copy(), self.order_T.copy(), algorithm, note)

    def _base_walk(self, touched: int) -> Score:
        self._device_T = self.device_G[self.problem.group_T]
        score = self._walk(self._restore(touched), np.inf, self.device_G, keep=True)
        self._base_end_P[:] = self._end_P
        self._base_sent[: self._counts[0]] = self._sent[: self._counts[0]]
        return score

    def _place(self, device_G: Ints, moved: list[int]) -> None:
        for group in moved:
            self._device_T[tables(self.problem).tasks_of(group)] = device_G[group]

    def _restore(self, touched: int) -> int:
        """Put the walk back to the last snapshot before a position. Returns: the position of the snapshot."""
        row = touched // self._stride
        if row == 0:
            for array in (self._ready_T, self._hold_P, self._free_P, self._state):
                array.fill(0.0)
            self._counts[0] = 0
            return 0
        ready, hold, free, state, counts = self._snapshots
        self._ready_T[:], self._hold_P[:], self._free_P[:] = ready[row], hold[row], free[row]
        self._state[:], self._counts[0] = state[row], counts[row]
        begin = row * self._stride
        self._end_P[:begin] = self._base_end_P[:begin]
        self._sent[: counts[row]] = self._base_sent[: counts[row]]
        return begin

    def _walk(self, begin: int, limit_s: float, device_G: Ints, *, keep: bool) -> Score:
        limited = limit_s < np.inf
        load_D = (
            np.bincount(device_G, self._seconds_GD[self._all_G, device_G], self.problem.devices) if limited else None
        )
        step_s = walk(
            begin,
            float(limit_s) * (1 + 1e-9),  # sums in another order differ in the last bits
            load_D if limited else self._no_load_D,
            self._stride,
            keep,
            self.order_T,
            self._position_T,
            self._device_T,
            self._seconds_TD,
            self._tail_T,
            *self._made,
            *self._links,
            self._ready_T,
            self._end_P,
            self._hold_P,
            self._free_P,
            self._state,
            self._sent,
            self._counts,
            *self._snapshots,
        )
        if step_s == np.inf:
            return Score(np.inf, 0.0)
        if begin:
            step_s = max(step_s, float(self._base_end_P[:begin].max()))
        D = self.problem.devices
        resident_D = self._resident(device_G)
        most_D = resident_D + self._state[D : 2 * D] + self._scratch
        if not (most_D > self.problem.memory_bytes_D).any():
            return Score(step_s, 0.0)
        over_D = self._peaks(resident_D) - self.problem.memory_bytes_D
        return Score(step_s, float(over_D[over_D > 0].sum()))

    def _resident(self, device_G: Ints) -> Floats:
        return np.bincount(device_G, weights=self._resident_G, minlength=self.problem.devices)

    def _peaks(self, resident_D: Floats) -> Floats:
        problem = self.problem
        arrays = (self._end_P, self._hold_P, self._free_P, self._sent, self._counts)
        return peak_bytes(self.order_T, self._device_T, problem.scratch_bytes_T, resident_D, *arrays)

    def _first_touched(self) -> Ints:
        """For every group the first position of its tasks and of those that make what they read."""
        problem, made = self.problem, tables(self.problem)
        first_T = self._position_T.copy()
        task_X = np.repeat(np.arange(problem.tasks), np.diff(made.first_read_T1))
        np.minimum.at(first_T, task_X, self._position_T[problem.producer_K[made.read_X]])
        first_G = np.full(problem.groups, max(problem.tasks - 1, 0))
        np.minimum.at(first_G, problem.group_T, first_T)
        return first_G


def _tails(problem: Problem) -> Floats:
    """The least time from the end of each task to the end of the step: the longest way on, at every task's best rate."""
    fastest_T = problem.seconds_TD.min(axis=1)
    tail_T = np.zeros(problem.tasks)
    made = tables(problem)
    for task in range(problem.tasks - 1, -1, -1):
        tensors = made.read_by(task)
        producers = problem.producer_K[tensors]
        np.maximum.at(tail_T, producers, tail_T[task] + fastest_T[task])
    return tail_T
