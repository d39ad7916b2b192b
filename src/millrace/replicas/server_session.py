"""A session whose variables lie on parameter servers, and whose steps are computed by workers of these.

What to do next is decided by `pool`; here it is done.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from millrace import errors
from millrace.compile.tiered import Say
from millrace.errors import FetchError, MillraceError, StepError, VariablesLostError, WorkerError, did_you_mean
from millrace.graph.graph import TRAIN, Graph
from millrace.graph.passes.halves import halves
from millrace.graph.passes.shards import shards
from millrace.graph.save import graph_bytes
from millrace.graph.signature import TensorSpec
from millrace.replicas import hub as hub_events
from millrace.replicas import shard_events
from millrace.replicas.hub import Hub
from millrace.replicas.kept import Kept
from millrace.replicas.pool import Pool
from millrace.replicas.pool_events import (
    AllRead,
    AllWritten,
    Done,
    FlushWanted,
    Kill,
    PoolCommand,
    PoolEvent,
    Sizes,
    Wanted,
    WriteWanted,
)
from millrace.replicas.programs import Programs, as_tensor
from millrace.replicas.protocol import Expect, Failed, Joined, Lost, ReadWanted, Said, StartMembers, Story, Tell
from millrace.replicas.regions import layout, to_json
from millrace.replicas.replica import NEW
from millrace.replicas.row_plan import row_plan
from millrace.replicas.server_worker import FEED, FETCH
from millrace.replicas.settings import Async, Sync
from millrace.replicas.shard_log import policy_to_json
from millrace.replicas.slices import examples_in, sizes_of, wholes_of
from millrace.replicas.worker import GRAPH, VARIABLE
from millrace.runtime.aliasing import Memory
from millrace.runtime.feeds import FeedReader
from millrace.runtime.messages import Message
from millrace.runtime.ranges import check_ranges, feed_ranges
from millrace.runtime.remote_session import RemoteSession

log = logging.getLogger(__name__)

STALENESS = "staleness"

_FIRST_STEP_S = 120.0  # without the compiler
_COMPILE_S = 3600.0
_CONTROL_S = 120.0  # for taking a role, sending a copy all it is to have, reading and writing all variables
_LEAST_PATIENCE_S = 2.0
_STEPS_OF_PATIENCE = 10
_SHARD_WRITES_S = 10.0  # that whoever a shard writes to may take nothing
_SLOWEST_BYTES_PER_S = 1e8
_GRACE_S = 3.0  # a worker whose shard does not answer says so before it is itself taken for stuck
_TURN_S = 1.0
_STORIES = 200  # kept for errors


@dataclass
class _Open:
    """A step that was handed out.

    parts: of each slice the program, the feeds and the number of examples. given: what of the driver's variables went
    with it. results: of each slice, what came beside its worker's answer. tau: of the push that it was part of.
    """

    batch: Any
    parts: list[tuple[int, dict[str, Tensor], int]]
    given: Mapping[str, Tensor] = field(default_factory=dict)
    results: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)
    tau: int = 0


class ServerSession(RemoteSession):
    """Runs steps of a graph over shards of its variables, on processes that may be lost.

    Args:
        graph: of the whole step.
        hub: starts processes and hears of them; the session closes it.
        update: how workers agree; with parameter servers.
        replicas: how many slices an update waits for (sync), or how many workers there are (async).
        spares: how many processes stand by.
        variables, compile, patience_s, drop_failing, directory: as for `ReplicatedSession`.

    Attributes:
        staleness: how many updates had each number of updates between their fetch and their turn.
        tables: the variables of which only rows travel.

    Raises: SettingError for a step that cannot be divided so.
    """

    def __init__(
        self,
        graph: Graph,
        hub: Hub,
        update: Sync | Async,
        *,
        replicas: int,
        spares: int = 1,
        variables: Mapping[str, Tensor] | None = None,
        compile: str = "tiered",
        patience_s: float | None = None,
        drop_failing: bool = False,
        directory: TemporaryDirectory[str] | None = None,
        say: Say = log.info,
    ) -> None:
        super().__init__(graph, variables, say)
        whole = halves(graph)
        plan = row_plan(whole, shards(whole.update, update.parameter_servers))
        for note in plan.notes:
            say(note)
        self._shards, self.tables = plan.shards, plan.tables
        self._exchanged = {feed.name for feed in whole.exchanged}
        self._fetches = {TRAIN, *whole.gradients.fetches} - self._exchanged
        held = {name for part in self._shards for name in part.variables}
        # What workers fetch whole.
        self._held = [v.name for v in whole.gradients.variables if v.name in held and v.name not in self.tables]
        self._sync = isinstance(update, Sync)
        self._kept = Kept(whole.gradients, held, self._own.variables, sync=self._sync)
        self.measures = () if self._sync else (STALENESS,)
        self.works_ahead = not self._sync
        self.stories: deque[str] = deque(maxlen=_STORIES)
        self.staleness: Counter[int] = Counter()
        self._hub, self._directory, self._update, self._replicas = hub, directory, update, replicas
        self._compile, self._patience_s, self._drop_failing, self._say = compile, patience_s, drop_failing, say
        self._reader = FeedReader(graph, Memory([]))
        self._ranges = feed_ranges(graph)
        self._programs = Programs(graph, self._reader, tables=self.tables)
        self._given: dict[str, set[int]] = {}  # which programs each worker has
        self._step = 0  # the next one
        self._open: dict[int, _Open] = {}
        self._done: deque[int] = deque()  # steps done that nobody has been told of
        self._beside: dict[tuple[str, str], Message] = {}
        self._answers: list[AllRead | AllWritten] = []
        self._writing: Mapping[str, Tensor] = {}
        self._failure = ""
        self._began_s: dict[str, float] = {}
        self._batch_s: deque[float] = deque(maxlen=50)
        self._tiers: deque[str] = deque(maxlen=replicas)
        self.closed = False
        self._sizes = _sizes(update, replicas, spares)
        self._pool = Pool(self._sizes)
        self._carry_out(self._pool.start())

    def close(self) -> None:
        """End the processes; what they hold of the variables goes with them."""
        self.closed = True
        self._hub.close()
        if self._directory is not None:
            self._directory.cleanup()

    def begin_again(self) -> None:
        """See `RemoteSession.begin_again`."""
        self._hub.clear("the run begins again")
        for forgotten in (self._given, self._open, self._done, self._beside, self._answers, self._began_s):
            forgotten.clear()
        self._step, self._stale, self._failure = 0, False, ""
        before, self._pool = self._pool, Pool(self._sizes)
        self._pool.repeats, self._pool.dropped = before.repeats, before.dropped
        self._carry_out(self._pool.start())

    @property
    def workers(self) -> tuple[str, ...]:
        """The processes that compute batches and are not known to be lost."""
        there = self._hub.members
        return tuple(member for member in self._given if member in there)

    def kill(self, member: str) -> None:
        """End one of the processes by SIGKILL, as a fault would."""
        self._hub.kill(member, "it was killed on purpose")

    # -- running --------------------------------------------------------------------------------------------------

    def run(self, fetches: str | Sequence[str], feed: Any = None) -> Any:
        """Run what `fetches` need; see `Session.run`. What changes no variable runs in this process.

        Raises: besides what `Session.run` raises, WorkerError when the variables are lost, StepError naming the worker
            whose batch failed.
        """
        names = (fetches,) if isinstance(fetches, str) else tuple(fetches)
        if TRAIN not in names:
            self.pull()
            return self._own.run(fetches, feed)
        ((found, _),) = self.stream(names, [feed])
        return found[0] if isinstance(fetches, str) else found

    def stream(self, fetches: Sequence[str], feeds: Iterable[Any]) -> Iterator[tuple[list[Any], Any]]:
        """Run a step for every batch, in async mode several at once; see `Session.stream`.

        A batch is taken from `feeds` as soon as a worker is free for it. When `feeds` is at its end, or gives a batch
        that does not fit, all that is in flight is finished and yielded first. Raises: as `run`.
        """
        for name in fetches:
            if name not in self._fetches and name not in self.measures:
                known = [*self._fetches, *self.measures]
                raise FetchError(f"{name!r} is no fetch of a step over servers. {did_you_mean(name, known)}")
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
        return self._pool.repeats

    @property
    def dropped(self) -> int:
        """How many pushes came too late to count (of backup workers)."""
        return self._pool.dropped

    @property
    def mean_staleness(self) -> float:
        """Of all updates."""
        return sum(tau * times for tau, times in self.staleness.items()) / max(self.staleness.total(), 1)

    @property
    def last_tier(self) -> str:
        """ "inductor" when all that workers ran last was compiled. (Servers update eagerly.)"""
        return "inductor" if set(self._tiers) == {"inductor"} else "eager"

    @property
    def members(self) -> tuple[str, ...]:
        """The processes that have joined and are not known to be lost."""
        return self._hub.members

    # -- variables ------------------------------------------------------------------------------------------------

    def read_all(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """See `RemoteSession.read_all`. All are of one moment: nothing is in flight when the servers are asked."""
        wanted = [v.name for v in self.graph.variables] if names is None else list(names)
        known = self._own.variables
        for name in wanted:
            if name not in known:
                raise FetchError(f"no variable is called {name!r}. {did_you_mean(name, list(known))}")
        values = dict(known)
        if self._stale:
            self._settle()
            answer = self._answer_to(ReadWanted())
            assert isinstance(answer, AllRead)
            for member in reversed(answer.members):  # of numbers that all servers have, the first one's count
                beside = self._beside[member, "read"].tensors
                values |= {name.removeprefix(VARIABLE): value for name, value in beside.items()}
            values |= self._kept.values
        return {name: values[name].clone() for name in wanted}

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
        check_ranges(self._ranges, [batch.given])
        slices, needed, parts = self._replicas, 1, [(1, batch.placed)]
        if isinstance(self._update, Sync):
            slices += self._update.backup
            sizes = sizes_of(examples_in(batch.placed, [f.name for f in self.graph.feeds]), slices)
            cut = [t.split(sizes) for t in batch.placed]
            parts = [(size, [part[index] for part in cut]) for index, size in enumerate(sizes)]
            needed = min(self._replicas, len(sizes))
        self._open[self._step] = _Open(feed, [(*self._programs.of(feeds), size) for size, feeds in parts])
        self._stale = True
        self._step += 1
        self._tell_pool(Wanted(self._step - 1, len(parts), needed))

    def _is_done(self, step: int, slices: Sequence[int]) -> None:
        """Take in what a step has made of this process's variables, and note that it is done."""
        done = self._open[step]
        done.results = {slice_: done.results[slice_] for slice_ in slices}
        news = [
            {name.removeprefix(NEW): value for name, value in result.items() if name.startswith(NEW)}
            for result in done.results.values()
        ]
        self._kept.take(done.given, news, [done.parts[slice_][2] for slice_ in slices])
        self._done.append(step)

    def _finished(self, step: int, fetches: Sequence[str]) -> tuple[list[Any], Any]:
        """The fetches of a step that is done, and its batch."""
        done = self._open.pop(step)
        found = [
            {name.removeprefix(FETCH): value for name, value in result.items() if name.startswith(FETCH)}
            for result in done.results.values()
        ]
        values = wholes_of(self.graph, found, [done.parts[slice_][2] for slice_ in done.results])
        values[STALENESS] = torch.tensor(float(done.tau))
        return [values.get(name) for name in fetches], done.batch

    # -- inside ---------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Wait until nothing is in flight. What comes of it is for nobody."""
        while self._open and not self._failure:
            if self._done:
                del self._open[self._done.popleft()]
            else:
                self._turn(flush=True)

    def _answer_to(self, wanted: ReadWanted | WriteWanted) -> AllRead | AllWritten:
        self._answers.clear()
        self._tell_pool(wanted)
        while not self._answers:
            self._turn()
        return self._answers.pop()

    def _turn(self, *, flush: bool = False) -> None:
        """Wait for something to happen, and do what follows. Bounded: whoever is waited for is under `Expect`."""
        if self._failure:
            raise WorkerError(f"this session has failed before: {self._failure}")
        if flush:
            self._tell_pool(FlushWanted())
        event = self._hub.next(_TURN_S)
        match event:
            case hub_events.Joined(member):
                self._tell_pool(Joined(member))
            case hub_events.Lost(member, why):
                self._given.pop(member, None)
                self._tell_pool(Lost(member, why))
            case hub_events.Said(member, message):
                if message.kind == "error":
                    self._failed_in(member, message)
                    return
                self._heard(member, message)
                self._tell_pool(Said(member, message.kind, message.fields))

    def _heard(self, member: str, message: Message) -> None:
        """Keep what came beside a message."""
        fields = message.fields
        if message.kind == "read":
            self._beside[member, "read"] = message
        elif message.kind == "done":
            self._batch_s.append(time.monotonic() - self._began_s[member])
            self._tiers.append(fields["tier"])
            if fields["step"] in self._open:
                self._open[fields["step"]].results[fields["slice"]] = message.tensors
        if fields.get("tau") is not None:
            self.staleness[fields["tau"]] += 1
            for step, _ in fields["pushed"]:
                if step in self._open:
                    self._open[step].tau = fields["tau"]

    def _failed_in(self, member: str, message: Message) -> None:
        text = f"{member}: {message.fields['text']}"
        self.stories.append(text)
        if self._drop_failing or message.fields["type"] == WorkerError.__name__:  # of others, not of the user's code
            self._say(f"{text}\nIt is replaced.")  # its process ends, which is a loss like any other
            return
        self._failure = text
        kind: type[MillraceError] = getattr(errors, message.fields["type"], StepError)
        raise kind(text)

    def _tell_pool(self, event: PoolEvent) -> None:
        self._carry_out(self._pool.handle(event))

    def _carry_out(self, commands: Sequence[PoolCommand]) -> None:
        for command in commands:
            match command:
                case Tell(member, kind, fields):
                    self._tell(member, kind, dict(fields))
                case StartMembers(count):
                    self._hub.start(count)
                case Kill(member, why):
                    self._hub.kill(member, why)
                case Expect(member, doing):
                    self._hub.expect(member, None if doing is None else self._within_s(doing))
                case Done(step, slices):
                    self._is_done(step, slices)
                case AllRead() | AllWritten():
                    self._answers.append(command)
                case Story(text):
                    self.stories.append(text)
                    log.debug(text)
                case Failed(reason, variables_lost):
                    self._failure = reason
                    error = VariablesLostError if variables_lost else WorkerError
                    raise error(f"{reason}\nWhat happened:\n  " + "\n  ".join(list(self.stories)[-12:]))

    def _tell(self, member: str, kind: str, fields: dict[str, Any]) -> None:
        tensors: dict[str, Tensor] = {}
        if kind == "role" and fields["role"] == "shard":
            fields, tensors = self._shard_role(fields)
        elif kind == "role":
            self._given[member] = set()
            every = {"fetch_every": 1, "push_every": 1}
            if isinstance(self._update, Async):
                every = {"fetch_every": self._update.fetch_every, "push_every": self._update.push_every}
            fields |= {"compile": self._compile, "timeout_s": _CONTROL_S / 4, "held": self._held, **every}
            tensors = {VARIABLE + name: value for name, value in self._kept.values.items()}
        elif kind == "batch":
            fields, tensors = self._batch(member, fields)
        elif kind == "write":
            own = self._shards[fields["shard"]].variables
            tensors = {VARIABLE + name: value for name, value in self._writing.items() if name in own}
        self._hub.send(member, Message(kind, fields, tensors))

    def _shard_role(self, fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        part = self._shards[fields["shard"]]
        values = {name: self._own.variables[name] for name in part.variables}
        places, _ = layout({name: TensorSpec.of(value) for name, value in values.items()})
        policy: shard_events.Policy = shard_events.Sync(fields["needed"])
        if isinstance(self._update, Async):
            policy = shard_events.Async(damped=self._update.weaken_stale)
        writes_s = _SHARD_WRITES_S + sum(value.nbytes for value in values.values()) / _SLOWEST_BYTES_PER_S
        fields |= {"policy": policy_to_json(policy), "variables": to_json(places), "timeout_s": writes_s}
        tensors = {GRAPH: as_tensor(graph_bytes(part.graph))}
        if not fields["copy"]:
            tensors |= {VARIABLE + name: value for name, value in values.items()}
        return fields, tensors

    def _batch(self, member: str, fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        step, slice_ = fields["step"], fields["slice"]
        wanted = self._open[step]
        key, feeds, examples = wanted.parts[slice_]
        if not (self._sync and wanted.given):
            wanted.given = self._kept.given()  # a slice that is given out again is given the same
        if key not in self._given[member]:
            self._given[member].add(key)
            program = {GRAPH: self._programs.content(key), **self._programs.indices(key)}
            self._hub.send(member, Message("program", {"key": key}, program))
        number = slice_ if self._sync else step
        fields |= {"key": key, "number": number, "examples": examples, "timeout_s": self._patience() / 2}
        self._began_s[member] = time.monotonic()
        tensors = {FEED + name: value for name, value in feeds.items()}
        return fields, tensors | {VARIABLE + name: value for name, value in wanted.given.items()}

    def _within_s(self, doing: str) -> float:
        return max(self._patience(), self._patience() / 2 + _GRACE_S) if doing.startswith("step") else _CONTROL_S

    def _patience(self) -> float:
        if not self._batch_s:
            return _COMPILE_S if self._compile == "inductor" else _FIRST_STEP_S
        usual_s = statistics.median(self._batch_s)
        return self._patience_s or max(_LEAST_PATIENCE_S, _STEPS_OF_PATIENCE * usual_s)


def _sizes(update: Sync | Async, replicas: int, spares: int) -> Sizes:
    sync = isinstance(update, Sync)
    return Sizes(
        update.parameter_servers,
        replicas + (update.backup if isinstance(update, Sync) else 0),
        update.copies,
        spares,
        sync,
        None if isinstance(update, Sync) else update.bound,
    )
