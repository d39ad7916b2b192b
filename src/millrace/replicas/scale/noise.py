"""How long computations take and when machines die, drawn by seed alone.

The k-th computation of a worker takes the same time under every way to agree, in whatever order events come, so ways
are compared on the same luck.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from millrace.replicas.scale.job import Failures, Job, Stragglers

Floats = npt.NDArray[np.float64]

_BLOCK = 16  # computations of every worker that are drawn at once
# What the seeds of independent streams differ in.
_SLOW, _COMPUTE, _DEATHS = 0, 1, 2


def slow_factors(stragglers: Stragglers, workers: int, seed: int) -> Floats:
    """[workers]: how much longer each always takes; the rounded share of them is slow, which ones the seed decides."""
    factor_W = np.ones(workers)
    chosen = np.random.default_rng([seed, _SLOW]).permutation(workers)[: round(stragglers.slow_share * workers)]
    factor_W[chosen] = stragglers.slow_factor
    return factor_W


def computations(job: Job, stragglers: Stragglers, slow_W: Floats, block: int, seed: int) -> Floats:
    """[workers, _BLOCK]: seconds of the block's computations of every worker."""
    shape = len(slow_W), _BLOCK
    random = np.random.default_rng([seed, _COMPUTE, block])
    seconds = job.compute_s * slow_W[:, None] * np.exp(stragglers.jitter * random.standard_normal(shape))
    paused = random.random(shape) < -np.expm1(-stragglers.pauses_per_s * seconds)
    length_s = stragglers.pause_s * np.exp(stragglers.pause_sigma * random.standard_normal(shape))
    return seconds + np.where(paused, length_s, 0.0)


class Computing:
    """Computations of units, one after the other; a unit is a group of `members` workers that wait for each other."""

    def __init__(self, job: Job, stragglers: Stragglers, units: int, members: int, seed: int) -> None:
        self._job, self._stragglers, self._seed = job, stragglers, seed
        self._members = members
        self._slow_W = slow_factors(stragglers, units * members, seed)
        self._blocks: list[tuple[list[list[float]], list[list[float]]]] = []
        self._count = [0] * units

    def next(self, unit: int) -> tuple[float, float]:
        """Seconds until the last member of the unit has computed, and seconds that all members worked."""
        block, place = divmod(self._count[unit], _BLOCK)
        self._count[unit] += 1
        if block == len(self._blocks):
            seconds = computations(self._job, self._stragglers, self._slow_W, block, self._seed)
            by_unit = seconds.reshape(-1, self._members, _BLOCK)
            self._blocks.append((by_unit.max(axis=1).tolist(), by_unit.sum(axis=1).tolist()))
        longest, worked = self._blocks[block]
        return longest[unit][place], worked[unit][place]


class Deaths:
    """When units die: the first death of any member."""

    def __init__(self, failures: Failures, units: int, members: int, seed: int) -> None:
        self.recovery_s = failures.recovery_s
        self._mean_s = failures.mean_s / members
        self._random = (
            [np.random.default_rng([seed, _DEATHS, unit]) for unit in range(units)] if failures.mean_s else []
        )
        self._next_s = [self._lifetime(unit) for unit in range(units)]

    def strike(self, unit: int, start_s: float, end_s: float) -> float | None:
        """When the unit dies before end_s; None if it lives. One due before the start strikes at the start."""
        death_s = self._next_s[unit]
        if death_s >= end_s:
            return None
        death_s = max(death_s, start_s)
        self._next_s[unit] = death_s + self.recovery_s + self._lifetime(unit)
        return death_s

    def _lifetime(self, unit: int) -> float:
        return float(self._random[unit].exponential(self._mean_s)) if self._random else math.inf
