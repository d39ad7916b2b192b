"""Synchronous steps with parameter servers, which take the first N gradients of N + b."""

from __future__ import annotations

from millrace.replicas.scale.events import ServerRun, Setup
from millrace.replicas.scale.ways import Synchronous


class SynchronousRun(ServerRun):
    """A gradient that comes late is pushed all the same, and dropped; its worker goes on with the newest variables.

    Late: for variables that have been updated since, or after N others for the same ones.
    """

    def __init__(self, setup: Setup, way: Synchronous) -> None:
        super().__init__(setup, setup.workers + way.backup, 1, setup.steps, setup.job.overlap)
        self._late_waits = way.late_waits
        shard_bytes = setup.job.gradient_bytes / setup.servers
        self._sum_s, self._apply_s = (shard_bytes * s for s in (setup.job.sum_s_per_byte, setup.job.apply_s_per_byte))
        self._accepted = 0
        self._last_update_s = 0.0
        self._waiting: list[int] = []  # for the next update
        self._read = [0] * self.units  # the version that each computes for

    def computed(self, unit: int) -> None:
        """Push, whatever the others have done meanwhile."""
        self.in_.start(self.now_s, self.setup.job.gradient_bytes, unit)

    def pushed(self, unit: int) -> None:
        """Take the gradient, or drop it."""
        current = self._read[unit] == self.tally.updates
        if not current or self._accepted == self.setup.workers:
            self.tally.dropped += 1
            if current or self._late_waits:
                self._waiting.append(unit)
            else:
                self.fetch(unit)
            return
        self._accepted += 1
        self.tally.applied += 1
        self._waiting.append(unit)
        self.work(self._sum_s)
        if self._accepted == self.setup.workers:
            self.at(self.work(self._apply_s), self._update, unit)

    def fetch(self, unit: int) -> None:
        """Send the newest variables."""
        self._read[unit] = self.tally.updates
        super().fetch(unit)

    def _update(self, _: int) -> None:
        self.tally.step_s.append(self.now_s - self._last_update_s)
        self._last_update_s, self._accepted = self.now_s, 0
        self.tally.tau.append(0)
        self.updated()
        waiting, self._waiting = self._waiting, []
        for unit in waiting:
            self.fetch(unit)

    def in_flight(self) -> int:
        """Late ones on their way."""
        return len(self.in_) + self.early
