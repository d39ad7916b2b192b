"""What a simulated run came to."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Outcome:
    """Rates, times and shares count from the end of the warm-up, gradients from the beginning of the run.

    workers: that an update waits for, or that work by themselves; machines: with the backup workers. steps_per_s:
    updates of the variables. examples_per_s: in gradients that were applied. step_s, step_p90_s, step_p99_s: median and
    percentiles of the time from one update to the next (synchronous), or from one computation of a worker, or group, to
    its next (otherwise). tau_counts: how many updates were applied to variables 0, 1, 2 … updates newer than the ones
    that their gradient was computed from. Gradients are counted once for each worker or group: computed = applied +
    dropped + in_flight; lost counts computations that a death cut short. Shares, of the whole time: of servers' cards
    that receive and send, of servers at work on gradients, of workers that compute.
    """

    workers: int
    machines: int
    servers: int
    steps_per_s: float
    examples_per_s: float
    step_s: float
    step_p90_s: float
    step_p99_s: float
    tau_counts: tuple[int, ...]
    computed: int
    applied: int
    dropped: int
    in_flight: int
    lost: int
    server_in_share: float
    server_out_share: float
    server_work_share: float
    worker_share: float

    @property
    def tau_mean(self) -> float:
        """Mean staleness."""
        counts = np.array(self.tau_counts)
        return float(counts @ np.arange(len(counts)) / max(counts.sum(), 1))

    def tau(self, share: float) -> int:
        """The smallest staleness that at least this share of the updates does not exceed."""
        reached = np.cumsum(self.tau_counts)
        return int(np.searchsorted(reached, share * reached[-1])) if len(reached) else 0


@dataclass
class Tally:
    """What is counted while a run goes on."""

    updates: int = 0
    computed: int = 0
    applied: int = 0
    dropped: int = 0
    lost: int = 0
    worked_s: float = 0.0  # of all workers
    server_s: float = 0.0  # that servers worked on gradients
    step_s: list[float] = field(default_factory=list)
    tau: list[int] = field(default_factory=list)


def percentiles(step_s: list[float]) -> tuple[float, float, float]:
    """Median, 90th and 99th."""
    low, middle, high = np.percentile(step_s, [50, 90, 99])
    return float(low), float(middle), float(high)
