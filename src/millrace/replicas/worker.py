"""The role of a worker: it holds a copy of the variables, computes slices, and adds up gradients with the others.

What to do next is decided by `worker_state`; here it is done.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from millrace.errors import WorkerError
from millrace.graph.save import graph_from_bytes
from millrace.replicas import gpus
from millrace.replicas.choose_group import form_group
from millrace.replicas.collective import Group
from millrace.replicas.divided import DividedPrograms
from millrace.replicas.line import Line
from millrace.replicas.local_replica import LocalReplica
from millrace.replicas.programs import as_bytes, pieces_beside
from millrace.replicas.protocol import (
    Adopt,
    AllReduce,
    Broadcast,
    CollectiveFailed,
    Computed,
    ComputeSlices,
    Fields,
    Formed,
    FormGroup,
    LeaveGroup,
    Reduced,
    Say,
    Story,
    Told,
    Update,
    Updated,
    WorkerCommand,
    WorkerEvent,
)
from millrace.replicas.reduction import Reduction, reducing_thread
from millrace.replicas.rendezvous import StoreAddress
from millrace.replicas.replica import Computed as Results
from millrace.replicas.replica import Replica, Slice
from millrace.replicas.settings import LocalSteps, Travel
from millrace.replicas.worker_state import WorkerState
from millrace.runtime.messages import LONGEST_WAIT_S, Message

_PART_BYTES = 64 * 2**20  # of the variables are given to others at a time

GRAPH, VARIABLE = "graph", "variable/"  # begin the names of tensors beside messages


def worker(line: Line, role: Message) -> None:
    """Be a worker until the driver ends."""
    _Worker(line, role).run()


class _Worker:
    def __init__(self, line: Line, role: Message) -> None:
        self._line = line
        self._state = WorkerState()
        self._role = role
        self._group: Group | None = None
        self._form: Fields = {}  # what the driver said of the last group
        self._feeds: Message | None = None  # of the step in flight
        self._results: Results | None = None
        self._slices: tuple[int, ...] = ()  # whose results those are
        self._made: dict[str, Tensor] = {}  # fetches of the update
        self._staged: dict[str, Tensor] = {}  # variables that were broadcast and are not adopted yet
        graph = graph_from_bytes(as_bytes(role.tensors[GRAPH]))
        given = {n.removeprefix(VARIABLE): t for n, t in role.tensors.items() if n.startswith(VARIABLE)}
        index = role.fields["gpu"]
        self._gpu = None if index is None else gpus.use_gpu(line.name, index)  # where variables are; None: on the CPU
        if self._gpu is not None:
            given = {name: value.to(self._gpu) for name, value in given.items()}
        settings: dict[str, Any] = {"compile": role.fields["compile"], "say": self._log}
        self._travel = Travel(**role.fields["travel"])
        self._thread = reducing_thread()
        self._reduction: Reduction | None = None  # of the step in flight
        self._replica: Replica | LocalReplica
        if role.fields["rule"] is None:
            stages = tuple(tuple(stage) for stage in role.fields["stages"])
            devices = role.fields["devices"]
            divided = DividedPrograms(devices, line, **settings) if devices else None
            self._replica = Replica(graph, given, stages=stages, elsewhere=divided, gpu=self._gpu, **settings)
        else:
            rule = LocalSteps(**role.fields["rule"])
            self._replica = LocalReplica(graph, given, rule, gpu=self._gpu, **settings)

    def run(self) -> None:
        self._handle(Told("role", self._role.fields))
        while True:
            message = self._line.next(LONGEST_WAIT_S)
            if message is None:
                continue
            if message.kind == "program":
                graph = graph_from_bytes(as_bytes(message.tensors[GRAPH]))
                self._replica.load(message.fields["key"], graph, pieces_beside(message.tensors))
            elif message.kind == "write":
                for name, value in message.tensors.items():
                    self._replica.variables[name].copy_(value)
            else:
                if message.kind == "step":
                    self._feeds = message
                elif message.kind == "form":
                    self._form = message.fields
                self._handle(Told(message.kind, message.fields))

    def _handle(self, event: WorkerEvent | None) -> None:
        while event is not None:
            event = self._carry_out(self._state.handle(event))

    def _carry_out(self, commands: Sequence[WorkerCommand]) -> WorkerEvent | None:
        """Do them in their order. Returns: what came of it; at most one of them ends in an event."""
        forming = next((c for c in commands if isinstance(c, FormGroup)), None)
        event: WorkerEvent | None = None
        for command in commands:
            try:
                event = self._do(command) or event
            except WorkerError as error:
                if not isinstance(command, FormGroup | Broadcast | AllReduce):
                    raise  # no fault of the others: this worker must end, not go on with half a step
                generation = self._state.generation
                self._log(f"the collective of generation {generation} failed: {error}")
                return CollectiveFailed(generation, str(error))
        return Formed(forming.generation) if forming is not None else event

    def _do(self, command: WorkerCommand) -> WorkerEvent | None:
        match command:
            case FormGroup(generation, rank, size):
                self._line.progress(f"forming generation {generation} as rank {rank} of {size}", waits=True)
                store = StoreAddress(**self._role.fields["store"])
                form = {**self._form, "generation": generation, "rank": rank, "size": size}
                self._group = form_group(self._line, store, form, self._travel, self._gpu)
            case Broadcast(_, source, behind, _):
                assert self._group is not None
                own, rank = self._replica.variables, self._group.rank
                self._staged = {n: torch.empty_like(t) for n, t in own.items()} if rank in behind else {}
                for part in _in_parts(own):
                    self._line.progress("taking all variables" if self._staged else "giving all variables", waits=True)
                    # Who needs none of it takes it all the same, elsewhere: what is its own must not be written to.
                    given = self._staged or (own if rank == source else {n: torch.empty_like(own[n]) for n in part})
                    self._group.broadcast([given[name] for name in part], source)
            case Adopt(generation, step):
                for name, value in self._staged.items():
                    self._replica.variables[name].copy_(value)
                self._staged = {}
                return Updated(generation, step)
            case ComputeSlices(generation, step, slices, weights, total):
                self._compute(step, slices, [weight / total for weight in weights])
                return Computed(generation, step)
            case AllReduce(generation, step):
                assert self._results is not None
                assert self._reduction is not None
                self._line.progress(f"adding up the gradients of step {step}", waits=True)
                results = self._results
                for names in results.stages[results.begun :]:
                    self._reduction.add([results.means[name] for name in names])
                self._reduction.finish()
                return Reduced(generation, step)
            case Update(generation, step):
                assert self._results is not None
                self._line.progress(f"updating the variables to step {step}")
                self._made = self._replica.commit(self._results.means, self._results.others)
                self._line.progress()
                return Updated(generation, step)
            case LeaveGroup():
                if self._group is not None:
                    self._group.abandon()
                    self._group = None
            case Say(kind, fields):
                beside = {name: value.cpu() for name, value in self._beside(kind).items()}
                told = {**fields, "tier": self._replica.tier} if kind == "done" else fields
                self._line.say(Message(kind, told, beside))
            case Story(text):
                self._log(text)
        return None

    def _compute(self, step: int, slices: Sequence[int], weights: Sequence[float]) -> None:
        assert self._feeds is not None
        keys, tensors = self._feeds.fields["keys"], self._feeds.tensors
        self._line.progress(f"computing slices {', '.join(map(str, slices))} of step {step}")
        parts = []
        for number, weight in zip(slices, weights, strict=True):
            batches: list[dict[str, Tensor]] = [{} for _ in range(self._feeds.fields["batches"])]
            for name, tensor in tensors.items():
                slice_, batch, feed = name.split("/", 2)
                if slice_ == str(number):
                    batches[int(batch)][feed] = tensor
            parts.append(Slice(number, keys[str(number)], weight, tuple(batches)))
        assert self._group is not None
        self._group.limit_waits(self._feeds.fields["timeout_s"])
        overlap = self._travel.overlap
        overlaps = self._group.overlaps if overlap is None else overlap
        self._reduction = Reduction(self._group, self._thread)
        self._results = self._replica.compute(parts, self._reduction.add if overlaps else None)
        self._slices = tuple(slices)

    def _beside(self, kind: str) -> dict[str, Tensor]:
        if kind == "values":
            return {VARIABLE + name: value for name, value in self._replica.variables.items()}
        if kind == "computed":
            assert self._results is not None
            return {
                f"{number}/{name}": value
                for number, fetches in zip(self._slices, self._results.fetches, strict=True)
                for name, value in fetches.items()
            }
        return self._made if kind == "done" else {}

    def _log(self, text: str) -> None:
        print(f"{self._line.name}: {text}", file=sys.stderr, flush=True)


def _in_parts(variables: Mapping[str, Tensor]) -> list[list[str]]:
    """All names, sorted, in parts of about `_PART_BYTES`."""
    parts: list[list[str]] = [[]]
    part_bytes = 0
    for name in sorted(variables):
        if part_bytes > _PART_BYTES:
            parts.append([])
            part_bytes = 0
        parts[-1].append(name)
        part_bytes += variables[name].nbytes
    return parts
