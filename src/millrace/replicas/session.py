"""A session whose step runs in several replicas at once, on processes that may be lost.

What to do next is decided by `coordinator`; here it is done.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from millrace.graph.graph import TRAIN, Graph
from millrace.graph.passes.beside import beside_parameters
from millrace.graph.passes.halves import Halves, halves
from millrace.graph.save import graph_bytes
from millrace.graph.signature import Variable
from millrace.replicas.coordinator import Coordinator
from millrace.replicas.hub import Hub
from millrace.replicas.members_session import CONTROL_S, MembersSession, MembersSettings
from millrace.replicas.nccl_group import FORM_S
from millrace.replicas.pool_events import PoolCommand
from millrace.replicas.programs import Programs, as_tensor
from millrace.replicas.protocol import (
    NOTHING,
    DriverCommand,
    DriverEvent,
    Fields,
    ReadWanted,
    Resized,
    StepDone,
    StepWanted,
    VariablesRead,
)
from millrace.replicas.rendezvous import Rendezvous
from millrace.replicas.settings import LocalSteps, Travel
from millrace.replicas.slices import examples_in, sizes_of, wholes_of
from millrace.replicas.stages import early_stages
from millrace.replicas.suspicion import GROUP_WAITS
from millrace.replicas.worker import GRAPH, VARIABLE
from millrace.runtime.messages import Message


@dataclass(frozen=True)
class _Slice:
    """key: of its program. batches: its feeds by name, of every batch of the step; none where it has no examples."""

    key: int
    batches: tuple[Mapping[str, Tensor], ...]


class ReplicatedSession(MembersSession):
    """Holds the variables of a graph on several workers, which compute slices of every batch; runs fetches.

    Args:
        graph: of the whole step.
        hub: starts the workers' processes and hears of them; the session closes it.
        rendezvous: where workers find each other; the session closes it.
        local: have workers train alone for some steps, and then agree; by default they agree in every step.
        replicas: how many slices a batch has, which is how many workers there are when none is missing.
        spares: how many processes stand by.
        travel: how gradients do.
        settings: see `MembersSettings`.
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
        travel: Travel | None = None,
        **settings: Unpack[MembersSettings],
    ) -> None:
        super().__init__(beside_parameters(graph) if local else graph, hub, **settings)
        self.replicas, self._spares = replicas, spares
        self._rendezvous = rendezvous
        self._rule = local
        whole = None if self._rule else halves(graph)
        self._shared = as_tensor(graph_bytes(whole.update if whole else graph))  # what every worker has
        self._variables = _of_both(whole) if whole else tuple(v.name for v in self.graph.variables)
        self._stages = early_stages(whole.gradients, [feed.name for feed in whole.exchanged]) if whole else ()
        self._travel = travel or Travel()
        whole_steps = local is not None
        own = self._own.variables
        self._programs = Programs(graph, self._reader, whole=whole_steps, variables=own, **self._divided)
        self._slices: list[_Slice] = []  # of the step in flight
        self._batches = 1  # in a step
        self._answers: list[StepDone | VariablesRead] = []
        self._tiers: set[str] = set()
        self._handed_out = (0, 0)  # the last step, and to which generation
        self.repeats = 0  # steps that were begun again
        self._start()

    def _start(self) -> None:
        self._step = 0
        self._answers.clear()
        self._coordinator = Coordinator(self.replicas, spares=self._spares)
        self._carry_out(self._coordinator.start())

    def begin_again(self) -> None:
        """See `RemoteSession.begin_again`."""
        self._rendezvous.close()
        self._rendezvous = Rendezvous(self._rendezvous.host)
        super().begin_again()

    def close(self) -> None:
        """End the workers; what they hold of the variables goes with them."""
        super().close()
        self._rendezvous.close()

    # -- running -------------------------------------------------------------------------------------------------

    def _train(self, names: Sequence[str], feed: Any) -> list[Any]:
        self._check_fetches(names, {TRAIN, *self.graph.fetches}, "replicas")
        values = self._take_step([feed])
        if self._rule:
            values = {name: value[0] for name, value in values.items()}
        return [values.get(name) for name in names]

    def run_steps(self, fetches: Sequence[str], feeds: Sequence[Any]) -> list[Any]:
        """Run one step per batch; see `Session.run_steps`. Under `LocalSteps` they end in one outer step."""
        if self._rule is None or TRAIN not in fetches:
            return super().run_steps(fetches, feeds)
        values = self._take_step(feeds)
        return [values.get(name) for name in fetches]

    def _resize(self, replicas: int) -> None:
        """From the next step on, divide batches over so many workers. More are started, or the last ones ended."""
        self.replicas = replicas
        self._decide(Resized(replicas))

    @property
    def last_tier(self) -> str:
        """ "inductor" when all that the last step ran was compiled."""
        return "inductor" if self._tiers == {"inductor"} else "eager"

    # -- variables -----------------------------------------------------------------------------------------------

    def _read_members(self) -> Mapping[str, Tensor]:
        answer = self._answer_to(ReadWanted())
        assert isinstance(answer, VariablesRead)
        values = self._beside.pop((answer.member, "values")).tensors
        return {name.removeprefix(VARIABLE): value for name, value in values.items()}

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
        names = [f.name for f in self.graph.feeds]
        sizes = sizes_of(examples_in(read[0].placed, names), self.replicas)
        parts = [[t.split(sizes) for t in batch.placed] for batch in read]
        self._slices = [
            self._slice([[part[index] for part in batch] for batch in parts]) for index in range(len(sizes))
        ]
        # Where there are fewer examples than replicas, some of these have nothing to do; they need a program even so.
        # Under local steps they train on what another has, with no weight, so that what counts steps stays the same.
        idle = self._slices[0] if self._rule else _Slice(self._slices[0].key, ())
        self._slices += [idle] * (self.replicas - len(sizes))
        self._batches = len(read)
        weights = [float(size) for size in sizes] + [0.0] * (self.replicas - len(sizes))
        began_s = time.monotonic()
        self._step += 1
        self._stale = True
        self._beside.clear()
        answer = self._answer_to(StepWanted(self._step, tuple(weights)))
        assert isinstance(answer, StepDone)
        self._times.add(time.monotonic() - began_s)
        return self._together(answer, sizes)

    def _slice(self, batches: Sequence[Sequence[Tensor]]) -> _Slice:
        """The program for slices of this shape, and the feeds of each batch by name."""
        each = [self._programs.of(batch) for batch in batches]
        return _Slice(each[0][0], tuple(feeds for _, feeds in each))

    def _together(self, done: StepDone, sizes: Sequence[int]) -> dict[str, Tensor]:
        """The fetches of a step from those of its slices."""
        by_slice: dict[int, dict[str, Tensor]] = {}
        made: dict[str, Tensor] = {}
        tiers: set[str] = set()
        for member, slices in done.slices.items():
            beside = self._beside[member, "computed"].tensors
            if (member, "done") in self._beside:
                finished = self._beside[member, "done"]
                made = dict(finished.tensors)
                tiers.add(str(finished.fields["tier"]))
            for number in slices:
                prefix = f"{number}/"
                by_slice[number] = {n.removeprefix(prefix): t for n, t in beside.items() if n.startswith(prefix)}
        self._tiers = tiers
        there = [number for number in sorted(by_slice) if number < len(sizes)]
        if done.missing:
            self._say(
                f"step {self.taken_before + done.step} is done, but what slices {list(done.missing)} count for in its "
                "loss and metrics was lost on the way from their worker"
            )
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
        """Do what the coordinator says until it answers."""
        self._answers.clear()
        while self._hear(0.0):  # who came or went since the last step
            pass
        self._decide(wanted)
        while not self._answers:
            self._hear()
        return self._answers.pop()

    def _decide(self, event: DriverEvent) -> None:
        self._carry_out(self._coordinator.handle(event))

    def _take(self, command: DriverCommand | PoolCommand) -> None:
        assert isinstance(command, StepDone | VariablesRead)
        self._answers.append(command)

    @property
    def complete(self) -> bool:
        """See `MembersSession.complete`."""
        return self._coordinator.complete

    @property
    def may_lose_a_worker(self) -> bool:
        """See `MembersSession.may_lose_a_worker`."""
        return len(set(self._coordinator.up_to_date) & set(self._hub.members)) > 1

    @property
    def _holders(self) -> int:
        return self.replicas

    @property
    def _present_step(self) -> int:
        return self._step

    def _step_of(self, member: str) -> int | None:
        return self._step

    def _within_s(self, doing: str) -> float:
        within_s = super()._within_s(doing)
        if doing == "read":
            return max(within_s, CONTROL_S)
        return max(within_s, FORM_S) if doing == "form" and self._on_gpus else within_s

    def _prepare(self, member: str, kind: str, fields: Fields) -> None:
        if kind == "step":
            for number in fields["slices"]:
                self._load(member, self._slices[number].key)

    def _tell(self, member: str, kind: str, fields: dict[str, Any]) -> None:
        tensors: dict[str, Tensor] = {}
        if kind == "role":
            fields |= {"role": "worker", **self._begin_worker(member)}
            fields |= {"stages": self._stages, "travel": asdict(self._travel)}
            fields |= {"store": asdict(self._rendezvous.address), "rule": asdict(self._rule) if self._rule else None}
            tensors = {GRAPH: self._shared} | self._variables_for(fields["committed"])
        elif kind == "step":
            handed_out = (fields["step"], fields["generation"])
            self.repeats += self._handed_out[0] == handed_out[0] and self._handed_out != handed_out
            self._handed_out = handed_out
            own = {number: self._slices[number] for number in fields["slices"]}
            fields |= {"keys": {str(number): one.key for number, one in own.items()}, "batches": self._batches}
            fields["timeout_s"] = GROUP_WAITS * self._within_s(kind)
            tensors = {
                f"{number}/{place}/{name}": feed
                for number, one in own.items()
                for place, feeds in enumerate(one.batches)
                for name, feed in feeds.items()
            }
        elif kind == "form":  # all of a group are told so at once
            fields |= self._meeting(self._given)
            fields["timeout_s"] = GROUP_WAITS * self._within_s(kind)
        self._hub.send(member, Message(kind, fields, tensors))

    def _variables_for(self, committed: int) -> dict[str, Tensor]:
        """All variables; without their values where others will give them."""
        own = self._own.variables
        given = {name: own[name] for name in self._variables}
        if committed == NOTHING:
            given = {name: torch.zeros_like(value) for name, value in given.items()}
        return {VARIABLE + name: value for name, value in given.items()}


def _of_both(whole: Halves) -> tuple[str, ...]:
    variables: list[Variable] = [*whole.gradients.variables, *whole.update.variables]
    return tuple(dict.fromkeys(variable.name for variable in variables))
