"""What a parameter server's shard decides: which pushes count, in what order, and when anybody is told so.

A pure state machine: events in, commands out, no clock, no tensors. The shell (`server.py`) stages a push whole under a
key before it says `Pushed`, and carries out the commands in their order.

A shard that has a copy writes a log: every push that counts and every new policy gets the next index, is forwarded to
the copy, and is entered. The copy enters the same log in the same order, which decides everything that `_enter` does,
so both reach the same state. What a worker is told waits until the copy has it too:

    worker ── push ──> shard ── forward(index) ──> copy
    worker <── ack ─── shard <─── has(index) ───── copy

So a worker that pushes again what was not acknowledged is right with either of them: who knows the push says so again,
who does not know it takes it. In sync mode a version is shown only when the copy has it, because a copy that took over
could otherwise make another one under the same number.
"""

from __future__ import annotations

from dataclasses import replace

from millrace.errors import WorkerError
from millrace.replicas.shard_events import (
    Ack,
    AckCopy,
    Apply,
    Async,
    BecomeShard,
    Command,
    Configured,
    CopyAcked,
    CopyGained,
    CopyLost,
    Drop,
    Entry,
    Event,
    FetchGivenUp,
    FetchWanted,
    Forward,
    Forwarded,
    Hold,
    Known,
    Policy,
    Pushed,
    Reply,
    Restored,
    SendState,
    Snapshot,
    Sync,
)

NO_LIMIT = 2**62


class ShardState:
    """The state of one shard, or of the copy of one.

    version: number of updates that the variables have seen, in sync mode the number of the step that comes next.
    dropped: number of pushes that did not count.
    """

    def __init__(
        self, policy: Policy, workers: tuple[str, ...] = (), *, version: int = 0, is_copy: bool = False
    ) -> None:
        self.is_copy = is_copy
        self.has_copy = False
        self.dropped = 0
        self._copied = 0  # how much of the log the copy is known to have
        self._acks: dict[int, Ack] = {}  # index -> what is told when the copy has it
        self._fetches: dict[str, int] = {}  # worker -> the step it waits for
        self._take(Snapshot(policy, workers, version, clocks=dict.fromkeys(workers, 0)))

    def handle(self, event: Event) -> list[Command]:
        """What is to be done about an event. Raises: WorkerError for one that this side cannot be told."""
        match event:
            case Pushed():
                return self._pushed(event)
            case Configured():
                return self._write(event)
            case FetchWanted(worker, step):
                self._fetches[worker] = step
                return self._released() or [Hold(worker, self.why_held(worker))]
            case FetchGivenUp(worker):
                self._fetches.pop(worker, None)
                return []
            case CopyGained():
                self.has_copy, self._copied = True, self.index
                return [SendState(self.snapshot())]
            case CopyAcked(index):
                self._copied = max(self._copied, index)
                return self._released()
            case CopyLost():
                self.has_copy = False
                return self._released()
            case Forwarded(index, entry):
                return self._forwarded(index, entry)
            case Restored(snapshot):
                self._take(snapshot)
                return [AckCopy(self.index)]
            case BecomeShard():
                self.is_copy = False
                return self._released()

    def why_held(self, worker: str) -> str:
        """Whom a worker's fetch waits for, in words; "" when for nobody."""
        step = self._fetches.get(worker)
        if step is None:
            return ""
        if self.is_copy:
            return "this process to take the lost shard's place"
        if isinstance(self.policy, Sync):
            if self.version < step:
                have = ", ".join(map(str, sorted(self.staged))) or "none"
                return f"step {self.version} to be complete: {self.policy.needed} slices are needed, those here: {have}"
            return f"the copy to have version {self.version}" if self.version_index > self.settled else ""
        return self._ahead_of(worker, self.policy)

    def limit(self) -> int:
        """The last version that every worker may read without asking; 0: each has to ask."""
        if self.is_copy:
            return 0
        if isinstance(self.policy, Sync):
            return self.version if self.version_index <= self.settled else 0
        return NO_LIMIT if self.policy.bound is None else 0

    def snapshot(self) -> Snapshot:
        """All that the log has decided so far."""
        return Snapshot(
            self.policy,
            self.workers,
            self.version,
            self.index,
            self.version_index,
            dict(self.known),
            dict(self.clocks),
            dict(self.staged),
        )

    # -- the shard: what comes in ---------------------------------------------------------------------------------

    def _pushed(self, push: Pushed) -> list[Command]:
        known = self.known.get(push.worker)
        if known is not None and push.sequence <= known.ack.sequence and not self.is_copy:
            # One that is not settled yet is acknowledged when it is.
            return [replace(known.ack, sequence=push.sequence)] if known.index <= self.settled else []
        why = self._refusal(push)
        if why:
            self.dropped += 1
            return [Drop(push.worker, push.sequence, why, self.version)]
        return self._write(push)

    def _refusal(self, push: Pushed) -> str:
        if self.is_copy:
            return "it came to a copy, which takes pushes from its shard only"
        if isinstance(self.policy, Async):
            return ""
        if push.step < self.version:
            return f"late: step {push.step} was complete without it, the variables are of version {self.version}"
        if push.step > self.version:
            return f"it is of step {push.step}, but the variables are of version {self.version}: fetch them first"
        if push.slice in self.staged:
            return f"slice {push.slice} of step {push.step} is here already, from {self.staged[push.slice].worker}"
        return ""

    def _write(self, entry: Entry) -> list[Command]:
        forward: list[Command] = [Forward(self.index + 1, entry)] if self.has_copy else []
        return [*forward, *self._enter(entry), *self._released()]

    @property
    def settled(self) -> int:
        """The part of the log that outlives this process, if a copy lives."""
        return self._copied if self.has_copy else self.index

    def _released(self) -> list[Command]:
        """What may be told now."""
        acks = [self._acks.pop(index) for index in sorted(self._acks) if index <= self.settled]
        ready = [worker for worker in self._fetches if not self.why_held(worker)]
        for worker in ready:
            del self._fetches[worker]
        return [*acks, *(Reply(worker, self.version) for worker in ready)]

    def _ahead_of(self, worker: str, policy: Async) -> str:
        if policy.bound is None or not self.clocks:
            return ""
        slowest = min(self.clocks.values())
        if self.clocks.get(worker, slowest) - slowest <= policy.bound:
            return ""
        names = ", ".join(name for name, clock in self.clocks.items() if clock == slowest)
        return f"{names}, which made {slowest} updates: with {policy.bound} more than the slowest one has to wait"

    # -- the copy -------------------------------------------------------------------------------------------------

    def _forwarded(self, index: int, entry: Entry) -> list[Command]:
        if not self.is_copy or index != self.index + 1:
            raise WorkerError(
                f"entry {index} of a shard's log came to {'a copy' if self.is_copy else 'a shard'} that has the log up "
                f"to {self.index}. A copy takes one shard's log from its beginning: start it anew."
            )
        return [*self._enter(entry), AckCopy(index)]

    # -- both: the log decides all that follows -------------------------------------------------------------------

    def _take(self, snapshot: Snapshot) -> None:
        self.policy, self.workers = snapshot.policy, snapshot.workers
        self.version, self.index, self.version_index = snapshot.version, snapshot.index, snapshot.version_index
        self.known, self.clocks, self.staged = dict(snapshot.known), dict(snapshot.clocks), dict(snapshot.staged)

    def _enter(self, entry: Entry) -> list[Command]:
        self.index += 1
        if isinstance(entry, Configured):
            return self._configure(entry)
        # After a crash a worker may know a version that the copy that took over has not reached.
        tau = max(0, self.version - entry.version)
        if isinstance(self.policy, Sync):
            self.staged[entry.slice] = entry
            commands = self._complete()
        else:
            weight = 1.0 / (1 + tau) if self.policy.damped else 1.0
            commands = [self._apply((entry.key,), (weight,))]
            if entry.worker in self.clocks:
                self.clocks[entry.worker] += 1
        ack = Ack(entry.worker, entry.sequence, self.version, tau)
        self.known[entry.worker] = Known(self.index, ack)
        if not self.is_copy:
            self._acks[self.index] = ack
        return commands

    def _configure(self, entry: Configured) -> list[Command]:
        self.policy, self.workers = entry.policy, entry.workers
        living = [clock for worker, clock in self.clocks.items() if worker in entry.workers]
        start = min(living, default=0)  # nobody is to wait for a newcomer's past
        self.clocks = {worker: self.clocks.get(worker, start) for worker in entry.workers}
        return self._complete()

    def _complete(self) -> list[Command]:
        """One update of what is staged, once it is enough: in the order of slices, weighted by examples."""
        enough = self.policy.needed if isinstance(self.policy, Sync) else 1
        if not self.staged or len(self.staged) < enough:
            return []
        pushes = [self.staged[slice] for slice in sorted(self.staged)]
        self.staged = {}
        total = sum(push.examples for push in pushes)
        return [self._apply(tuple(p.key for p in pushes), tuple(p.examples / total for p in pushes))]

    def _apply(self, keys: tuple[str, ...], weights: tuple[float, ...]) -> Apply:
        self.version += 1
        self.version_index = self.index
        return Apply(keys, weights, self.version)
