"""Step time and memory of many plans: the numbers of `simulate.py`, fast."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from millrace.place.problem import Floats, Ints, Problem
from millrace.place.tables import tables
from millrace.place.walk import peak_bytes, walk


@dataclass(frozen=True)
class Score:
    """What a plan comes to. over_bytes: what all devices lack in memory."""

    step_s: float
    over_bytes: float


class Evaluator:
    """Scores plans for one problem, in memory that it keeps."""

    def __init__(self, problem: Problem) -> None:
        assert problem.devices <= 62, "the devices that a tensor reaches are kept in the bits of one integer"
        self.problem = problem
        T, D = problem.tasks, problem.devices
        wires = int(problem.wire_DD.max(initial=-1)) + 1
        self._position_T = np.empty(T, dtype=np.int64)
        self._ready_T, self._end_P, self._hold_P, self._free_P = (np.zeros(T) for _ in range(4))
        self._state = np.zeros(3 * D + wires)
        self._sent = np.zeros((len(problem.producer_K) * max(D - 1, 1), 4))
        self._counts = np.zeros(1, dtype=np.int64)
        self._no_load_D, self._no_tail_T = np.zeros(D), np.zeros(T)

    def score(self, device_G: Ints, order_T: Ints) -> Score:
        """The time of a step, and what it lacks in memory (not looked at where the time is infinite)."""
        step_s = self._walk(device_G, order_T)
        if step_s == np.inf:
            return Score(np.inf, 0.0)
        over_D = self._peaks(device_G, order_T) - self.problem.memory_bytes_D
        return Score(step_s, float(over_D[over_D > 0].sum()))

    def peak_bytes(self, device_G: Ints, order_T: Ints) -> Floats:
        """The most memory of each device at a time: [D]."""
        self._walk(device_G, order_T)
        return self._peaks(device_G, order_T)

    def _walk(self, device_G: Ints, order_T: Ints) -> float:
        problem, made = self.problem, tables(self.problem)
        self._position_T[order_T] = np.arange(problem.tasks)
        for array in (self._ready_T, self._hold_P, self._free_P, self._state, self._counts):
            array.fill(0)
        step_s: float = walk(
            np.inf,
            self._no_load_D,
            order_T,
            self._position_T,
            device_G[problem.group_T],
            problem.seconds_TD,
            self._no_tail_T,
            made.first_made_T1,
            made.made_K,
            problem.bytes_K,
            problem.wire_bytes_K,
            problem.first_use_K1,
            problem.uses_C,
            problem.latency_s_DD,
            problem.bytes_per_s_DD,
            problem.wire_DD,
            self._ready_T,
            self._end_P,
            self._hold_P,
            self._free_P,
            self._state,
            self._sent,
            self._counts,
        )
        return step_s

    def _peaks(self, device_G: Ints, order_T: Ints) -> Floats:
        problem = self.problem
        resident_D = np.bincount(device_G, problem.resident_bytes_G, problem.devices).astype(np.float64)
        arrays = (self._end_P, self._hold_P, self._free_P, self._sent, self._counts)
        peaks: Floats = peak_bytes(order_T, device_G[problem.group_T], problem.scratch_bytes_T, resident_D, *arrays)
        return peaks


def least_seconds_after(problem: Problem) -> Floats:
    """The least time from the end of each task to the end of the step, every task on its fastest device: [T]."""
    fastest_T = problem.seconds_TD.min(axis=1)
    tail_T = np.zeros(problem.tasks)
    made = tables(problem)
    for task in range(problem.tasks - 1, -1, -1):
        producers = problem.producer_K[made.read_by(task)]
        np.maximum.at(tail_T, producers, tail_T[task] + fastest_T[task])
    return tail_T
