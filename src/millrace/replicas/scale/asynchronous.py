"""Workers, or groups of workers, that exchange values with the servers each by itself."""

from __future__ import annotations

from millrace.replicas.scale.collective import broadcast_s, reduced_s, ring_s
from millrace.replicas.scale.events import ServerRun, Setup
from millrace.replicas.scale.ways import Asynchronous, Hybrid


class AsynchronousRun(ServerRun):
    """Every push is one update. A worker waits until its own push is applied.

    A group: all-reduce inside, its first worker pushes the mean and fetches, and sends the variables to the others. Of
    that only the all-reduce overlaps with computing, in a job that overlaps.
    """

    def __init__(self, setup: Setup, way: Asynchronous | Hybrid) -> None:
        size = way.group_size if isinstance(way, Hybrid) else 1
        self._way = Asynchronous() if isinstance(way, Hybrid) else way
        units = setup.workers // size
        updates = max(1, setup.steps * units // self._way.push_every)
        super().__init__(setup, units, size, updates, setup.job.overlap and size == 1)
        self._reduce_s = ring_s(setup.job.gradient_bytes, size, setup.network)
        self._spread_s = broadcast_s(setup.job.fetch_bytes, size, setup.network)
        self._apply_s = setup.job.gradient_bytes / setup.servers * setup.job.apply_s_per_byte
        self._applying = 0  # pushes that the servers have and have not applied
        self._read = [0] * units  # version of the variables that each computes with
        self._count = [0] * units  # its computations
        self._started_s = [0.0] * units  # when its last computation began

    def unit_s(self, slowest_s: float) -> float:
        """Variables to all members, their computation, and their gradients' mean."""
        return self._spread_s + reduced_s(slowest_s, self._reduce_s, self.setup.job.overlap)

    def compute(self, unit: int, start_s: float, whole_s: float) -> None:
        """Compute, and note how long the step before it was."""
        if start_s > 0.0:
            self.tally.step_s.append(start_s - self._started_s[unit])
        self._started_s[unit] = start_s
        super().compute(unit, start_s, whole_s)

    def computed(self, unit: int) -> None:
        """Push or fetch, if it is time, or compute on."""
        self._count[unit] += 1
        if self._count[unit] % self._way.push_every == 0:
            self.in_.start(self.now_s, self.setup.job.gradient_bytes, unit)
        elif self._count[unit] % self._way.fetch_every == 0:
            self.at(self.end_s[unit] + self.setup.network.latency_s, self.fetch, unit)
        else:
            self.compute(unit, self.end_s[unit], self.end_s[unit])

    def pushed(self, unit: int) -> None:
        """Apply it when those before it are."""
        self._applying += 1
        self.at(self.work(self._apply_s), self._applied, unit)

    def fetch(self, unit: int) -> None:
        """Send the variables as they are."""
        self._read[unit] = self.tally.updates
        super().fetch(unit)

    def _applied(self, unit: int) -> None:
        self._applying -= 1
        self.tally.applied += self._way.push_every
        self.tally.tau.append(self.tally.updates - self._read[unit])
        self.updated()
        if self._count[unit] % self._way.fetch_every == 0:
            self.fetch(unit)
        else:
            acknowledged_s = self.now_s + self.setup.network.latency_s
            self.compute(unit, acknowledged_s, acknowledged_s)

    def in_flight(self) -> int:
        """On the wire, in the servers' queue, or not pushed yet."""
        kept = sum(count % self._way.push_every for count in self._count)
        return kept + (len(self.in_) + self.early + self._applying) * self._way.push_every
