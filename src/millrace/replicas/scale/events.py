"""The run of a job with parameter servers: a heap of events and two wires, to the servers and back.

What one step of a worker is: compute; latency; push, as fast as the cards allow; the servers take it whole and work on
it, one gradient after the other; the answer brings the variables, as fast as the cards allow; latency. In a job that
overlaps, the forward pass begins when the first of the variables come and ends when it has them all, and the push
begins with the backward pass and ends not before it does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush

from millrace.replicas.scale.job import FORWARD_SHARE, Failures, Job, Network, Stragglers
from millrace.replicas.scale.noise import Computing, Deaths
from millrace.replicas.scale.outcome import Outcome, Tally, percentiles
from millrace.replicas.scale.wire import Wire

WARM_UP = 0.1  # share of the updates that rates and times leave out


@dataclass(frozen=True)
class Setup:
    """Everything about a run but the way to agree."""

    job: Job
    network: Network
    workers: int
    servers: int
    steps: int
    seed: int
    stragglers: Stragglers
    failures: Failures


@dataclass(frozen=True)
class _Mark:
    """Where the warm-up ended."""

    now_s: float
    applied: int
    updates: int
    worked_s: float
    server_s: float
    in_bytes: float
    out_bytes: float
    steps: int
    taus: int


class ServerRun(ABC):
    """Units (workers, or groups of `members`) that exchange values with servers until there were enough updates.

    overlap: as of a job.
    """

    def __init__(self, setup: Setup, units: int, members: int, updates: int, overlap: bool) -> None:
        self.setup, self.units, self.members, self.updates, self.overlap = setup, units, members, updates, overlap
        network = setup.network
        self.in_ = Wire(setup.servers * network.of_server, network.bytes_per_s)
        self.out = Wire(setup.servers * network.of_server, network.bytes_per_s)
        self.computing = Computing(setup.job, setup.stragglers, units, members, setup.seed)
        self.deaths = Deaths(setup.failures, units, members, setup.seed)
        self.now_s, self.servers_free_s = 0.0, 0.0
        self.end_s = [0.0] * units  # when each has computed, or had
        self.early = 0  # gradients whose push has ended before their backward pass
        self._asked_s = [0.0] * units  # when servers began to send to each
        self.tally = Tally()
        self._events: list[tuple[float, int, Callable[[int], None], int]] = []
        self._number = 0
        self._mark = self._marked()

    @abstractmethod
    def pushed(self, unit: int) -> None:
        """The servers have the unit's gradient whole."""

    @abstractmethod
    def computed(self, unit: int) -> None:
        """The unit can begin to push."""

    @abstractmethod
    def in_flight(self) -> int:
        """Gradients that were computed and neither applied nor dropped yet."""

    def unit_s(self, slowest_s: float) -> float:
        """What a unit takes to compute whose slowest member takes so long."""
        return slowest_s

    def fetch(self, unit: int) -> None:
        """The servers begin to send the unit the variables as they are now."""
        self._asked_s[unit] = self.now_s
        self.out.start(self.now_s, self.setup.job.fetch_bytes, unit)

    def at(self, time_s: float, do: Callable[[int], None], unit: int) -> None:
        """Do something later; of two things at one time, that which was said first."""
        self._number += 1
        heappush(self._events, (time_s, self._number, do, unit))

    def compute(self, unit: int, start_s: float, whole_s: float) -> None:
        """Let the unit compute: start_s is when it has the first of the variables, whole_s when it has them all."""
        slowest_s, worked_s = self.computing.next(unit)
        length_s = self.unit_s(slowest_s)
        forward_s = FORWARD_SHARE * length_s if self.overlap else length_s
        push_s = max(whole_s, start_s + forward_s)
        end_s = self.end_s[unit] = push_s + (length_s - forward_s)
        death_s = self.deaths.strike(unit, start_s, end_s)
        if death_s is not None:
            self.tally.lost += 1
            self.at(death_s + self.deaths.recovery_s, self.fetch, unit)
            return
        self.tally.worked_s += worked_s
        self.at(push_s + self.setup.network.latency_s, self._computed, unit)

    def _computed(self, unit: int) -> None:
        self.tally.computed += 1
        self.computed(unit)

    def _sent(self, unit: int) -> None:
        if self.now_s >= self.end_s[unit]:
            self.pushed(unit)
            return
        self.early += 1
        self.at(self.end_s[unit] + self.setup.network.latency_s, self._sent_early, unit)

    def _sent_early(self, unit: int) -> None:
        self.early -= 1
        self.pushed(unit)

    def _fetched(self, unit: int) -> None:
        latency_s = self.setup.network.latency_s
        start_s = self._asked_s[unit] if self.overlap else self.now_s
        self.compute(unit, start_s + latency_s, self.now_s + latency_s)

    def work(self, seconds: float) -> float:
        """Let the servers work on one more gradient, after those before it. Returns: when they have."""
        self.servers_free_s = max(self.servers_free_s, self.now_s) + seconds
        self.tally.server_s += seconds
        return self.servers_free_s

    def updated(self) -> None:
        """Count an update, and end the warm-up where it is time."""
        self.tally.updates += 1
        if self.tally.updates == int(WARM_UP * self.updates):
            self._mark = self._marked()

    def run(self) -> Outcome:
        """From the start, with the variables on every worker, to the last update."""
        for unit in range(self.units):
            self.compute(unit, 0.0, 0.0)
        in_, out, events = self.in_, self.out, self._events
        while self.tally.updates < self.updates:
            event_s = events[0][0] if events else float("inf")
            if in_.next_s <= event_s and in_.next_s <= out.next_s:
                self.now_s = in_.next_s
                self._sent(in_.finish())
            elif out.next_s <= event_s:
                self.now_s = out.next_s
                self._fetched(out.finish())
            else:
                self.now_s, _, do, unit = heappop(events)
                do(unit)
        return self._outcome()

    def _marked(self) -> _Mark:
        tally, now_s = self.tally, self.now_s
        carried = self.in_.carried_bytes(now_s), self.out.carried_bytes(now_s)
        counts = tally.applied, tally.updates, tally.worked_s, tally.server_s
        return _Mark(now_s, *counts, *carried, len(tally.step_s), len(tally.tau))

    def _outcome(self) -> Outcome:
        setup, tally, begin, end = self.setup, self.tally, self._mark, self._marked()
        seconds = end.now_s - begin.now_s
        server_bytes = seconds * setup.servers * setup.network.of_server
        examples = (end.applied - begin.applied) * self.members * setup.job.examples
        tau_counts: list[int] = [0] * (max(tally.tau[begin.taus :], default=-1) + 1)
        for tau in tally.tau[begin.taus :]:
            tau_counts[tau] += 1
        median_s, p90_s, p99_s = percentiles(tally.step_s[begin.steps :])
        return Outcome(
            workers=setup.workers,
            machines=self.units * self.members,
            servers=setup.servers,
            steps_per_s=(end.updates - begin.updates) / seconds,
            examples_per_s=examples / seconds,
            step_s=median_s,
            step_p90_s=p90_s,
            step_p99_s=p99_s,
            tau_counts=tuple(tau_counts),
            computed=tally.computed,
            applied=tally.applied,
            dropped=tally.dropped,
            in_flight=self.in_flight(),
            lost=tally.lost,
            server_in_share=(end.in_bytes - begin.in_bytes) / server_bytes,
            server_out_share=(end.out_bytes - begin.out_bytes) / server_bytes,
            server_work_share=(end.server_s - begin.server_s) / seconds,
            worker_share=(end.worked_s - begin.worked_s) / seconds / (self.units * self.members),
        )
