"""A session whose variables lie on parameter servers, and whose steps are computed by workers of these.

What to do next is decided by `pool`; here it is done.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor

from millrace.graph.graph import TRAIN, Graph
from millrace.graph.passes.halves import halves
from millrace.graph.passes.shards import shards
from millrace.replicas import shard_events
from millrace.replicas.divided import NEW
from millrace.replicas.hub import Hub
from millrace.replicas.kept import Kept
from millrace.replicas.members_session import CONTROL_S, MembersSession, MembersSettings
from millrace.replicas.open_step import OpenStep
from millrace.replicas.pool import Pool
from millrace.replicas.pool_events import (
    AllRead,
    AllWritten,
    Done,
    FlushWanted,
    PoolCommand,
    PoolEvent,
    Sizes,
    Wanted,
    WriteWanted,
)
from millrace.replicas.programs import Programs
from millrace.replicas.protocol import DriverCommand, ReadWanted, Resized
from millrace.replicas.row_plan import row_plan
from millrace.replicas.server_worker import FEED, FETCH
from millrace.replicas.settings import Async, Hybrid, Sync
from millrace.replicas.shard_setup import shard_setup
from millrace.replicas.slices import examples_in, sizes_of, wholes_of
from millrace.replicas.worker import VARIABLE
from millrace.runtime.messages import Message

STALENESS = "staleness"

_WHOLE = "a replica that is divided over devices is given all variables"
_GRACE_S = 3.0  # a worker whose shard does not answer says so before it is itself taken for stuck


class ServerSession(MembersSession):
    """Runs steps of a graph over shards of its variables, on processes that may be lost.

    Args:
        graph: of the whole step.
        hub: starts processes and hears of them; the session closes it.
        update: how workers agree; with parameter servers.
        replicas: how many slices an update waits for (sync), or how many workers there are (async; hybrid: in a group).
        spares: how many processes stand by.
        settings: see `MembersSettings`.

    Attributes:
        staleness: how many updates had each number of updates between their fetch and their turn.
        tables: the variables of which only rows travel.

    Raises: SettingError for a step that cannot be divided so.
    """

    def __init__(
        self,
        graph: Graph,
        hub: Hub,
        update: Sync | Async | Hybrid,
        *,
        replicas: int,
        spares: int = 1,
        **settings: Unpack[MembersSettings],
    ) -> None:
        super().__init__(graph, hub, **settings)
        whole = halves(graph)
        plan = row_plan(whole, shards(whole.update, update.parameter_servers), _WHOLE if self._devices else "")
        for note in plan.notes:
            self._say(note)
        self._shards, self.tables = plan.shards, plan.tables
        divides = None if isinstance(update, Async) else self._own.variables
        self._programs = Programs(graph, self._reader, tables=self.tables, variables=divides, **self._divided)
        self._exchanged = {feed.name for feed in whole.exchanged}
        self._fetches = {TRAIN, *whole.gradients.fetches} - self._exchanged
        held = {name for part in self._shards for name in part.variables}
        # What workers fetch whole.
        self._held = [v.name for v in whole.gradients.variables if v.name in held and v.name not in self.tables]
        self._sync = isinstance(update, Sync)
        self._kept = Kept(whole.gradients, held, self._own.variables, sync=self._sync)
        self.measures = () if self._sync else (STALENESS,)
        self.works_ahead = not self._sync
        self.staleness: Counter[int] = Counter()
        self._update, self._replicas = update, replicas
        self._open: dict[int, OpenStep] = {}
        self._done: deque[int] = deque()  # steps done that nobody has been told of
        self._answers: list[AllRead | AllWritten] = []
        self._writing: Mapping[str, Tensor] = {}
        self._began_s: dict[str, float] = {}
        self._tiers: deque[str] = deque(maxlen=replicas)
        self._sizes = _sizes(update, replicas, spares)
        self._repeats = self._dropped = 0  # of the pools before this one
        self._start()

    def _new_pool(self) -> Pool:
        return Pool(self._sizes)

    def _start(self) -> None:
        self._step = 0  # the next one
        for forgotten in (self._open, self._done, self._answers, self._began_s):
            forgotten.clear()
        self._pool = self._new_pool()
        self._carry_out(self._pool.start())

    def begin_again(self) -> None:
        """See `RemoteSession.begin_again`."""
        self._repeats, self._dropped = self.repeats, self.dropped
        super().begin_again()

    # -- running --------------------------------------------------------------------------------------------------

    def _train(self, names: Sequence[str], feed: Any) -> list[Any]:
        ((found, _),) = self.stream(names, [feed])
        return found

    def stream(self, fetches: Sequence[str], feeds: Iterable[Any]) -> Iterator[tuple[list[Any], Any]]:
        """Run a step for every batch, in async mode several at once; see `Session.stream`.

        A batch is taken from `feeds` as soon as a worker is free for it. When `feeds` is at its end, or gives a batch
        that does not fit, all that is in flight is finished and yielded first. Raises: as `run`.
        """
        self._check_fetches(fetches, {*self._fetches, *self.measures}, "servers")
        batches, more, failure = iter(feeds), True, None
        self._settle()
        try:
            while more or self._open:
                while more and self._has_room():
                    try:
                        self._hand_out(next(batches))
                    except StopIteration:
                        more = False
                    except Exception as error:
                        failure, more = error, False
                if self._done:
                    yield self._finished(self._done.popleft(), fetches)
                elif self._open or more:
                    self._turn(flush=not more)
        finally:
            self._settle()
        if failure is not None:
            raise failure

    @property
    def repeats(self) -> int:
        """How many batches or slices were given out again, as their worker was lost."""
        return self._repeats + self._pool.repeats

    def _resize(self, replicas: int) -> None:
        """From now on have so many workers (sync: and slices, from the next step on). More are started and fetch the
        variables from the servers, or the last ones end when they have pushed what they are at."""
        backup = self._update.backup if isinstance(self._update, Sync) else 0
        self._replicas, self._sizes = replicas, replace(self._sizes, workers=replicas + backup)
        self._decide(Resized(replicas + backup))

    @property
    def complete(self) -> bool:
        """See `MembersSession.complete`."""
        return self._pool.complete

    @property
    def holders(self) -> tuple[str, ...]:
        """The processes that hold the variables, by shard."""
        return tuple(place.holder for place in self._pool.places)

    @property
    def copy_holders(self) -> tuple[str, ...]:
        """The processes that hold the copies, by shard; "" for none."""
        return tuple(place.copy for place in self._pool.places)

    @property
    def dropped(self) -> int:
        """How many pushes came too late to count (of backup workers)."""
        return self._dropped + self._pool.dropped

    @property
    def mean_staleness(self) -> float:
        """Of all updates."""
        return sum(tau * times for tau, times in self.staleness.items()) / max(self.staleness.total(), 1)

    @property
    def last_tier(self) -> str:
        """ "inductor" when all that workers ran last was compiled. (Servers update eagerly.)"""
        return "inductor" if set(self._tiers) == {"inductor"} else "eager"

    # -- variables ------------------------------------------------------------------------------------------------

    def _read_members(self) -> Mapping[str, Tensor]:
        """All are of one moment: nothing is in flight when the servers are asked."""
        self._settle()
        self._beside.clear()
        answer = self._answer_to(ReadWanted())
        assert isinstance(answer, AllRead)
        values: dict[str, Tensor] = {}
        for member in reversed(answer.members):  # of numbers that all servers have, the first one's count
            beside = self._beside.pop((member, "read")).tensors
            values |= {name.removeprefix(VARIABLE): value for name, value in beside.items()}
        return values | {name: value.clone() for name, value in self._kept.values.items()}

    def _write(self, values: Mapping[str, Tensor]) -> None:
        self._settle()
        if self._own.variables is not values:
            self.pull()
            for name, value in values.items():
                self._own.variables[name].copy_(value)
        self._kept.set(self._own.variables)
        self._writing = {name: value.clone() for name, value in values.items()}
        self._answer_to(WriteWanted())
        beside = {VARIABLE + name: value for name, value in self._kept.values.items()}
        for member in self._given:
            self._hub.send(member, Message("write", {}, beside))

    # -- steps ----------------------------------------------------------------------------------------------------

    def _has_room(self) -> bool:
        return not self._open if self._sync else self._pool.room > 0

    def _hand_out(self, feed: Any) -> None:
        batch = self._reader.read(feed)
        wanted = Wanted(self._step)
        parts: list[tuple[int, Sequence[Tensor]]] = [(1, batch.placed)]
        if isinstance(self._update, Sync):
            parts = self._cut(batch.placed, self._replicas + self._update.backup)
            wanted = Wanted(self._step, len(parts), min(self._replicas, len(parts)))
        elif isinstance(self._update, Hybrid):
            parts = self._cut(batch.placed, self._replicas)
        self._open[self._step] = OpenStep(feed, [(*self._programs.of(feeds), size) for size, feeds in parts])
        self._stale = True
        self._step += 1
        self._decide(wanted)

    def _cut(self, feeds: Sequence[Tensor], slices: int) -> list[tuple[int, Sequence[Tensor]]]:
        """The sizes and feeds of so many slices, or of fewer where there are not enough examples."""
        sizes = sizes_of(examples_in(feeds, [f.name for f in self.graph.feeds]), slices)
        cut = [feed.split(sizes) for feed in feeds]
        return [(size, [part[index] for part in cut]) for index, size in enumerate(sizes)]

    def _is_done(self, step: int, slices: Sequence[int]) -> None:
        """Take in what a step has made of this process's variables, and note that it is done."""
        done = self._open[step]
        done.results = {slice_: done.results[slice_] for slice_ in slices}
        self._kept.take(done.given, done.beside(NEW), done.sizes)
        self._done.append(step)

    def _finished(self, step: int, fetches: Sequence[str]) -> tuple[list[Any], Any]:
        """The fetches of a step that is done, and its batch."""
        done = self._open.pop(step)
        values = wholes_of(self.graph, done.beside(FETCH), done.sizes)
        values[STALENESS] = torch.tensor(float(done.tau))
        return [values.get(name) for name in fetches], done.batch

    # -- inside ---------------------------------------------------------------------------------------------------

    def _turn(self, *, flush: bool) -> None:
        """Hear of something. flush: what workers have not pushed yet is to be pushed."""
        if flush:
            self._decide(FlushWanted())
        self._hear()

    def _settle(self) -> None:
        """Wait until nothing is in flight. What comes of it is for nobody."""
        while self._open and not self._failure and not self.closed:
            if self._done:
                del self._open[self._done.popleft()]
            else:
                self._turn(flush=True)

    def _answer_to(self, wanted: ReadWanted | WriteWanted) -> AllRead | AllWritten:
        self._answers.clear()
        self._decide(wanted)
        while not self._answers:
            self._hear()
        return self._answers.pop()

    def _decide(self, event: PoolEvent) -> None:
        self._carry_out(self._pool.handle(event))

    def _take(self, command: DriverCommand | PoolCommand) -> None:
        if isinstance(command, Done):
            self._is_done(command.step, command.slices)
        else:
            assert isinstance(command, AllRead | AllWritten)
            self._answers.append(command)

    @property
    def _present_step(self) -> int:
        return min(self._open, default=self._step) + 1

    def _step_of(self, member: str) -> int | None:
        work = self._pool.work_of(member)
        return work[0] + 1 if work else None

    def _keep(self, member: str, message: Message) -> None:
        fields = message.fields
        if message.kind == "read":
            self._beside[member, "read"] = message
        elif message.kind == "done":
            self._times.add(time.monotonic() - self._began_s[member])
            self._tiers.append(fields["tier"])
        if message.kind == ("computed" if self._sync else "done") and fields["step"] in self._open:
            self._keep_results(self._open[fields["step"]], message)
        if fields.get("tau") is not None:
            self.staleness[fields["tau"]] += 1
            for step, _ in fields["pushed"]:
                if step in self._open:
                    self._open[step].tau = fields["tau"]

    def _keep_results(self, step: OpenStep, message: Message) -> None:
        # Of a slice that is computed again the first count: after its gradients did, variables are others.
        step.results.setdefault(message.fields["slice"], message.tensors)

    def _tell(self, member: str, kind: str, fields: dict[str, Any]) -> None:
        tensors: dict[str, Tensor] = {}
        if kind == "role" and fields["role"] == "shard":
            fields, tensors = self._shard_role(fields)
        elif kind == "role":
            fields |= {**self._begin_worker(member), "timeout_s": CONTROL_S / 4, "held": self._held}
            fields |= self._worker_settings()
            tensors = {VARIABLE + name: value for name, value in self._kept.values.items()}
        elif kind == "batch":
            fields, tensors = self._batch(member, fields)
        elif kind == "write":
            own = self._shards[fields["shard"]].variables
            tensors = {VARIABLE + name: value for name, value in self._writing.items() if name in own}
        self._hub.send(member, Message(kind, fields, tensors))

    def _worker_settings(self) -> dict[str, Any]:
        """What else its role says to a worker."""
        every: dict[str, Any] = {"fetch_every": 1, "push_every": 1, "overlap": False}
        if isinstance(self._update, Async):
            every = {name: getattr(self._update, name) for name in every}
        return {**every, "sync": self._sync}

    def _shard_role(self, fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        policy: shard_events.Policy = shard_events.Sync(fields["needed"])
        if isinstance(self._update, Async | Hybrid):
            policy = shard_events.Async(damped=self._update.weaken_stale)
        more, tensors = shard_setup(self._shards[fields["shard"]], self._own.variables, policy, copy=fields["copy"])
        return {**fields, **more}, tensors

    def _batch(self, member: str, fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        step, slice_ = fields["step"], fields["slice"]
        wanted = self._open[step]
        key, feeds, examples = wanted.parts[slice_]
        if not (self._sync and wanted.given):
            wanted.given = self._kept.given()  # a slice that is given out again is given the same
        self._load(member, key)
        number = slice_ if self._sync else step
        fields |= {"key": key, "number": number, "examples": examples, "timeout_s": self._patience_s / 2}
        self._began_s[member] = time.monotonic()
        tensors = {FEED + name: value for name, value in feeds.items()}
        return fields, tensors | {VARIABLE + name: value for name, value in wanted.given.items()}

    def _within_s(self, doing: str) -> float:
        patience_s = self._patience_s
        return max(patience_s, patience_s / 2 + _GRACE_S) if doing.startswith("step") else CONTROL_S


def _sizes(update: Sync | Async | Hybrid, replicas: int, spares: int) -> Sizes:
    servers, copies = update.parameter_servers, update.copies
    if isinstance(update, Sync):
        return Sizes(servers, replicas + update.backup, copies, spares, sync=True)
    if isinstance(update, Async):
        return Sizes(servers, replicas, copies, spares, bound=update.bound)
    return Sizes(servers, update.groups, copies, spares, bound=update.bound, group=replicas)
