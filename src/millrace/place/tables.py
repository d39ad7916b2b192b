"""What follows from a problem alone, worked out once: who makes and reads which tensors, sums over groups."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from millrace.place.problem import Floats, Ints, Problem

FORWARD, BACKWARD, AFTER = 0, 1, 2  # AFTER: not a backward task, but it needs one to have ended (an update)


@dataclass(frozen=True, eq=False)
class Tables:
    """Derived arrays of a problem; the letters are those of `Problem`. X: pairs of (task, tensor that it reads)."""

    first_made_T1: Ints  # task t makes the tensors made_K[first_made[t]:first_made[t + 1]]
    made_K: Ints
    first_read_T1: Ints  # task t reads the tensors read_X[first_read[t]:first_read[t + 1]]
    read_X: Ints
    first_task_G1: Ints  # group g has the tasks tasks_T[first_task[g]:first_task[g + 1]]
    tasks_T: Ints
    phase_T: Ints  # FORWARD, BACKWARD or AFTER
    microbatches: int
    seconds_GD: Floats  # of all tasks of a group; infinite where one of them may not run
    allowed_GD: NDArray[np.bool_]
    held_bytes_G: Floats  # what the forward tasks of one microbatch leave for later phases
    working_bytes_G: Floats  # the largest task: its scratch and all that it makes

    def tasks_of(self, group: int) -> Ints:
        """The tasks of a group, in the order of their numbers."""
        return self.tasks_T[self.first_task_G1[group] : self.first_task_G1[group + 1]]

    def made_by(self, task: int) -> Ints:
        """The tensors that a task makes."""
        return self.made_K[self.first_made_T1[task] : self.first_made_T1[task + 1]]

    def read_by(self, task: int) -> Ints:
        """The tensors that a task reads."""
        return self.read_X[self.first_read_T1[task] : self.first_read_T1[task + 1]]


@functools.lru_cache(maxsize=16)
def tables(problem: Problem) -> Tables:
    """The derived arrays of a problem (kept for the last few problems)."""
    T, K = problem.tasks, len(problem.producer_K)
    made_K, first_made_T1 = _rows(problem.producer_K, T)
    # Tensor numbers stand in the order of uses_C, so a stable sort by task gives each task its tensors in rising order.
    uses, first_read_T1 = _rows(problem.uses_C, T)
    read_X = np.repeat(np.arange(K), np.diff(problem.first_use_K1))[uses]
    tasks_T, first_task_G1 = _rows(problem.group_T, problem.groups)
    phase_T = _phases(problem, first_read_T1, read_X)
    seconds_GD = np.zeros((problem.groups, problem.devices))
    np.add.at(seconds_GD, problem.group_T, problem.seconds_TD)
    microbatches = max(len(np.unique(problem.microbatch_T[phase_T == FORWARD])), 1)
    later_K = np.zeros(K, dtype=bool)
    for task in range(T):
        tensors = read_X[first_read_T1[task] : first_read_T1[task + 1]]
        later_K[tensors[phase_T[problem.producer_K[tensors]] < phase_T[task]]] = True
    kept_K = later_K & (phase_T[problem.producer_K] == FORWARD)
    held_G = np.bincount(
        problem.group_T[problem.producer_K], weights=problem.bytes_K * kept_K, minlength=problem.groups
    )
    made_bytes_T = np.bincount(problem.producer_K, weights=problem.bytes_K, minlength=T)
    working_G = np.zeros(problem.groups)
    np.maximum.at(working_G, problem.group_T, made_bytes_T + problem.scratch_bytes_T)
    return Tables(
        first_made_T1=first_made_T1,
        made_K=made_K,
        first_read_T1=first_read_T1,
        read_X=read_X,
        first_task_G1=first_task_G1,
        tasks_T=tasks_T,
        phase_T=phase_T,
        microbatches=microbatches,
        seconds_GD=seconds_GD,
        allowed_GD=np.isfinite(seconds_GD),
        held_bytes_G=held_G / microbatches,
        working_bytes_G=working_G,
    )


def transfer_seconds(problem: Problem, size_bytes: float, source: int, target: int) -> float:
    """How long a tensor takes from one device to another, once the wire is free."""
    return float(problem.latency_s_DD[source, target] + size_bytes / problem.bytes_per_s_DD[source, target])


def _rows(row_N: Ints, rows: int) -> tuple[Ints, Ints]:
    """The indices of `row_N` sorted by row, and where each row begins."""
    order = np.argsort(row_N, kind="stable").astype(np.int64)
    return order, np.concatenate([[0], np.cumsum(np.bincount(row_N, minlength=rows))]).astype(np.int64)


def _phases(problem: Problem, first_read_T1: Ints, read_X: Ints) -> Ints:
    """FORWARD, BACKWARD or AFTER for every task; tasks come after those whose tensors they read."""
    phase_T = np.where(problem.backward_T, BACKWARD, FORWARD)
    for task in range(problem.tasks):
        if not problem.backward_T[task]:
            tensors = read_X[first_read_T1[task] : first_read_T1[task + 1]]
            if len(tensors) and phase_T[problem.producer_K[tensors]].max() > FORWARD:
                phase_T[task] = AFTER
    return phase_T.astype(np.int64)
