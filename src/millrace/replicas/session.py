"""A session whose step runs in several replicas at once, on processes that may be lost.

What to do next is decided by `coordinator`; here it is done.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from millrace import errors
from millrace.compile.tiered import Say
from millrace.errors import FetchError, MillraceError, StepError, VariablesLostError, WorkerError, did_you_mean
from millrace.graph.graph import TRAIN, Graph
from millrace.graph.passes.halves import Halves, halves
from millrace.graph.save import graph_bytes
from millrace.graph.signature import Variable
from millrace.replicas import hub as hub_events
from millrace.replicas.coordinator import Coordinator
from millrace.replicas.hub import Hub
from millrace.replicas.programs import Programs, as_tensor
from millrace.replicas.protocol import (
    NOTHING,
    DriverCommand,
    DriverEvent,
    Expect,
    Failed,
    Joined,
    Lost,
    ReadWanted,
    Resized,
    Said,
    StartMembers,
    StepDone,
    StepWanted,
    Stop,
    Story,
    Tell,
    VariablesRead,
)
from millrace.replicas.rendezvous import Rendezvous
from millrace.replicas.settings import LocalSteps
from millrace.replicas.slices import examples_in, sizes_of, wholes_of
from millrace.replicas.worker import GRAPH, UPDATE, VARIABLE
from millrace.runtime.aliasing import Memory
from millrace.runtime.feeds import FeedReader
from millrace.runtime.messages import Message
from millrace.runtime.ranges import check_ranges, feed_ranges
from millrace.runtime.remote_session import RemoteSession

log = logging.getLogger(__name__)

_FIRST_STEP_S = 120.0  # without the compiler
_COMPILE_S = 3600.0
_LEAST_PATIENCE_S = 2.0
_STEPS_OF_PATIENCE = 10
_TURN_S = 1.0
_STORIES = 200  # kept for errors


@dataclass(frozen=True)
class _Slice:
    """key: of its program. batches: its feeds by name, of every batch of the step; none where it has no examples."""

    key: int
    batches: tuple[Mapping[str, Tensor], ...]


class ReplicatedSession(RemoteSession):
    """Holds the variables of a graph on several workers, which compute slices of every batch; runs fetches.

    Args:
        graph: of the whole step.
        hub: starts the workers' processes and hears of them; the session closes it.
        rendezvous: where workers find each other; the session closes it.
        local: have workers train alone for some steps, and then agree; by default they agree in every step.
        replicas: how many slices a batch has, which is how many workers there are when none is missing.
        spares: how many processes stand by.
        variables: name -> value, where they are not `graph.initial`.
        compile: as for `Session`.
        patience_s: how long a worker may do nothing that can be seen. None: ten times what a step takes, at least 2 s.
        drop_failing: whether a worker whose step raises an error is replaced like one that was killed. Otherwise, by
            default, the error ends the run.
        directory: what the processes share; the session removes it.
    """

    def __init__(
        self,
        graph: Graph,
        hub: Hub,
        rendezvous: Rendezvous,
        *,
        local: LocalSteps | None = None,
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
        self.replicas, self._spares = replicas, spares
        self.stories: deque[str] = deque(maxlen=_STORIES)  # what happened to the workers, the last last
        self._hub, self._rendezvous, self._directory = hub, rendezvous, directory
        self._compile, self._patience_s, self._drop_failing, self._say = compile, patience_s, drop_failing, say
        self._reader = FeedReader(graph, Memory([]))
        self._ranges = feed_ranges(graph)
        self._rule = local
        whole = None if self._rule else halves(graph)
        self._shared = as_tensor(graph_bytes(whole.update if whole else graph))  # what every worker has
        self._variables = _of_both(whole) if whole else tuple(v.name for v in graph.variables)
        self._programs = Programs(graph, self._reader, whole=local is not None)
        self._hosts: dict[str, str] = {}  # the machine of every member that there was
        self._given: dict[str, set[int]] = {}  # which programs each worker has
        self._slices: list[_Slice] = []  # of the step in flight
        self._batches = 1  # in a step
        self._beside: dict[tuple[str, str], Message] = {}  # the newest message of each member and kind
        self._answers: list[StepDone | VariablesRead] = []
        self._step = 0
        self._step_s: deque[float] = deque(maxlen=50)
        self._tiers: set[str] = set()
        self.closed = False
        self._coordinator = Coordinator(replicas, spares=spares)
        self._carry_out(self._coordinator.start())

    def close(self) -> None:
        """End the workers; what they hold of the variables goes with them."""
        self.closed = True
        self._hub.close()
        self._rendezvous.close()
        if self._directory is not None:
            self._directory.cleanup()

    def begin_again(self) -> None:
        """See `RemoteSession.begin_again`."""
        self._hub.clear("the run begins again")
        for forgotten in (self._hosts, self._given, self._beside, self._answers, self._tiers):
            forgotten.clear()
        self._step, self._stale = 0, False
        self._rendezvous.close()
        self._rendezvous = Rendezvous(self._rendezvous.host)
        self._coordinator = Coordinator(self.replicas, spares=self._spares)
        self._carry_out(self._coordinator.start())

    # -- running -------------------------------------------------------------------------------------------------

    def run(self, fetches: str | Sequence[str], feed: Any = None) -> Any:
        """Run what `fetches` need; see `Session.run`. What changes no variable runs in this process.

        Raises: besides what `Session.run` raises, WorkerError when no worker is left, StepError naming the worker whose
            slice failed.
        """
        names = (fetches,) if isinstance(fetches, str) else tuple(fetches)
        if TRAIN not in names:
            self.pull()
            return self._own.run(fetches, feed)
        for name in names:
            if name != TRAIN and name not in self.graph.fetches:
                raise FetchError(
                    f"{name!r} is no fetch of a step over replicas. {did_you_mean(name, list(self.graph.fetches))}"
                )
        values = self._take_step([feed])
        if self._rule:
            values = {name: value[0] for name, value in values.items()}
        found = [values.get(name) for name in names]
        return found[0] if isinstance(fetches, str) else found

    def run_steps(self, fetches: Sequence[str], feeds: Sequence[Any]) -> list[Any]:
        """Run one step per batch; see `Session.run_steps`. Under `LocalSteps` they end in one outer step."""
        if self._rule is None or TRAIN not in fetches:
            return super().run_steps(fetches, feeds)
        values = self._take_step(feeds)
        return [values.get(name) for name in fetches]

    def resize(self, replicas: int) -> None:
        """From the next step on, divide batches over so many workers. More are started, or the last ones ended."""
        self.replicas = replicas
        self._carry_out(self._coordinator.handle(Resized(replicas)))

    def kill(self, member: str) -> None:
        """End one of the processes by SIGKILL, as a fault would."""
        self._hub.kill(member, "it was killed on purpose")

    @property
    def last_tier(self) -> str:
        """ "inductor" when all that the last step ran was compiled."""
        return "inductor" if self._tiers == {"inductor"} else "eager"

    @property
    def workers(self) -> tuple[str, ...]:
        """The processes that have a replica and are not known to be lost."""
        there = self._hub.members
        return tuple(member for member in self._given if member in there)

    @property
    def members(self) -> tuple[str, ...]:
        """All processes that have joined and are not known to be lost: workers, and those that stand by."""
        return self._hub.members

    # -- variables -----------------------------------------------------------------------------------------------

    def read_all(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """See `RemoteSession.read_all`."""
        wanted = [v.name for v in self.graph.variables] if names is None else list(names)
        known = self._own.variables
        for name in wanted:
            if name not in known:
                raise FetchError(f"no variable is called {name!r}. {did_you_mean(name, list(known))}")
        if not self._stale:
            return {name: known[name].clone() for name in wanted}
        answer = self._answer_to(ReadWanted())
        assert isinstance(answer, VariablesRead)
        values = self._beside[answer.member, "values"].tensors
        return {name: values.get(VARIABLE + name, known[name]) for name in wanted}

    def _write(self, values: Mapping[str, Tensor]) -> None:
        if self._own.variables is not values:
            self.pull()  # who is given a role later is given these
            for name, value in values.items():
                self._own.variables[name].copy_(value)
        if self._step:
            for member in self._given:
                own = {name: value for name, value in values.items() if name in self._variables}
                self._hub.send(member, Message("write", {}, own))

    # -- inside --------------------------------------------------------------------------------------------------

    def _take_step(self, feeds: Sequence[Any]) -> dict[str, Tensor]:
        """One step of the coordinator's: of one batch, or of several of one shape, which workers train on alone."""
        read = [self._reader.read(feed) for feed in feeds]
        check_ranges(self._ranges, [batch.given for batch in read])
        names = [f.name for f in self.graph.feeds]
        sizes = sizes_of(examples_in(read[0].placed, names), self.replicas)
        parts = [[t.split(sizes) for t in batch.placed] for batch in read]
        self._slices = [
            self._slice([[part[index] for part in batch] for batch in parts]) for index in range(len(sizes))
        ]
        # Where there are fewer examples than replicas, some of these have nothing to do; they need a program even so.
        self._slices += [_Slice(self._slices[0].key, ())] * (self.replicas - len(sizes))
        self._batches = len(read)
        weights = [float(size) for size in sizes] + [0.0] * (self.replicas - len(sizes))
        began_s = time.monotonic()
        self._step += 1
        self._stale = True
        answer = self._answer_to(StepWanted(self._step, tuple(weights)))
        assert isinstance(answer, StepDone)
        self._step_s.append(time.monotonic() - began_s)
        return self._together(answer, sizes)

    def _slice(self, batches: Sequence[Sequence[Tensor]]) -> _Slice:
        """The program for slices of this shape, and the feeds of each batch by name."""
        each = [self._programs.of(batch) for batch in batches]
        return _Slice(each[0][0], tuple(feeds for _, feeds in each))

    def _together(self, done: StepDone, sizes: Sequence[int]) -> dict[str, Tensor]:
        """The fetches of a step from those of its slices."""
        by_slice: dict[int, dict[str, Tensor]] = {}
        made: dict[str, Tensor] = {}
        self._tiers = {str(fields["tier"]) for fields in done.results.values()}
        for member, slices in done.slices.items():
            beside = self._beside[member, "results"].tensors
            made = made or {n.removeprefix(f"{UPDATE}/"): t for n, t in beside.items() if n.startswith(f"{UPDATE}/")}
            for number in slices:
                prefix = f"{number}/"
                by_slice[number] = {n.removeprefix(prefix): t for n, t in beside.items() if n.startswith(prefix)}
        there = [number for number in sorted(by_slice) if number < len(sizes)]
        if done.missing:
            self._say(f"step {done.step}: the results of slices {list(done.missing)} were lost with their worker")
        if not there:
            return made
        parts, shares = [by_slice[n] for n in there], [sizes[n] for n in there]
        if self._rule is None:
            return {**wholes_of(self.graph, parts, shares), **made}
        each = [
            wholes_of(self.graph, [{n: v[i] for n, v in part.items()} for part in parts], shares)
            for i in range(self._batches)
        ]
        return {name: torch.stack([values[name] for values in each]) for name in each[0]}

    def _answer_to(self, wanted: StepWanted | ReadWanted) -> StepDone | VariablesRead:
        """Do what the coordinator says until it answers. Bounded: whoever it waits for is under `Expect`."""
        self._answers.clear()
        while (event := self._hub.next(0.0)) is not None:  # who came or went since the last step
            self._heard(event)
        self._carry_out(self._coordinator.handle(wanted))
        while not self._answers:
            if (event := self._hub.next(_TURN_S)) is not None:
                self._heard(event)
        return self._answers.pop()

    def _heard(self, event: hub_events.Event) -> None:
        told: DriverEvent
        match event:
            case hub_events.Joined(member, host=host):
                self._hosts[member] = host
                told = Joined(member)
            case hub_events.Lost(member, why):
                if member in self._given:  # not one that stood by, or was not needed any more
                    self._say(f"worker {member} was lost in step {self._step}: {why}")
                    del self._given[member]
                told = Lost(member, why)
            case hub_events.Said(member, message):
                if message.kind == "error":
                    self._failed_in(member, message)
                    return
                kind = "results" if "tier" in message.fields else message.kind
                self._beside[member, kind] = message
                told = Said(member, message.kind, message.fields)
        self._carry_out(self._coordinator.handle(told))

    def _failed_in(self, member: str, message: Message) -> None:
        text = f"worker {member}, step {self._step}: {message.fields['text']}"
        self.stories.append(text)
        if self._drop_failing:
            self._say(f"{text}\nIt is replaced.")  # its process ends, which is a loss like any other
            return
        kind: type[MillraceError] = getattr(errors, message.fields["type"], StepError)
        raise kind(text)

    def _carry_out(self, commands: Sequence[DriverCommand]) -> None:
        for command in commands:
            match command:
                case Tell(member, kind, fields):
                    self._tell(member, kind, dict(fields))
                case StartMembers(count):
                    self._hub.start(count)
                case Stop(member):
                    self._given.pop(member, None)
                    self._hub.kill(member, "not needed any more")
                case Expect(member, doing):
                    self._hub.expect(member, None if doing is None else self._patience())
                case StepDone() | VariablesRead():
                    self._answers.append(command)
                case Story(text):
                    self.stories.append(text)
                    log.debug(text)
                case Failed(reason, variables_lost):
                    error = VariablesLostError if variables_lost else WorkerError
                    raise error(f"{reason}\nWhat happened:\n  " + "\n  ".join(list(self.stories)[-12:]))

    def _tell(self, member: str, kind: str, fields: dict[str, Any]) -> None:
        tensors: dict[str, Tensor] = {}
        if kind == "role":
            self._given[member] = set()
            fields |= {
                "role": "worker",
                "compile": self._compile,
                "timeout_s": self._patience(),
            }
            fields |= {"store": asdict(self._rendezvous.address), "rule": asdict(self._rule) if self._rule else None}
            tensors = {GRAPH: self._shared} | self._variables_for(fields["committed"])
        elif kind == "step":
            own = {number: self._slices[number] for number in fields["slices"]}
            fields |= {"keys": {str(number): one.key for number, one in own.items()}, "batches": self._batches}
            tensors = {
                f"{number}/{place}/{name}": feed
                for number, one in own.items()
                for place, feeds in enumerate(one.batches)
                for name, feed in feeds.items()
            }
            for key in dict.fromkeys(one.key for one in own.values()):
                if key not in self._given[member]:
                    self._given[member].add(key)
                    self._hub.send(member, Message("program", {"key": key}, {GRAPH: self._programs.content(key)}))
        elif kind == "form":  # all of a group are told so at once
            fields["one_host"] = len({self._hosts[worker] for worker in self._given}) == 1
        self._hub.send(member, Message(kind, fields, tensors))

    def _variables_for(self, committed: int) -> dict[str, Tensor]:
        """All variables; without their values where others will give them."""
        own = self._own.variables
        given = {name: own[name] for name in self._variables}
        if committed == NOTHING:
            given = {name: torch.zeros_like(value) for name, value in given.items()}
        return {VARIABLE + name: value for name, value in given.items()}

    def _patience(self) -> float:
        if not self._step_s:
            return _COMPILE_S if self._compile == "inductor" else _FIRST_STEP_S
        usual_s = statistics.median(self._step_s)
        return self._patience_s or max(_LEAST_PATIENCE_S, _STEPS_OF_PATIENCE * usual_s)


def _of_both(whole: Halves) -> tuple[str, ...]:
    variables: list[Variable] = [*whole.gradients.variables, *whole.update.variables]
    return tuple(dict.fromkeys(variable.name for variable in variables))
