"""The role of a worker of parameter servers: fetch variables, compute the gradients of a batch, push them.

A shard that is lost is waited for: the driver says where its next holder is, which is then asked again what was open.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from millrace.errors import WorkerError
from millrace.graph.save import graph_from_bytes
from millrace.replicas.batch_rows import BatchRows, added
from millrace.replicas.line import Line
from millrace.replicas.programs import INDICES, as_bytes
from millrace.replicas.replica import NEW, Gradients
from millrace.replicas.server_client import Receipt, ShardClient
from millrace.replicas.shard_clients import ShardClients
from millrace.replicas.shard_store import Rows
from millrace.replicas.worker import GRAPH, VARIABLE
from millrace.runtime.messages import LONGEST_WAIT_S, Message

FEED, FETCH = "feed/", "fetch/"  # begin the names of tensors beside messages
_MOVE_S = 120.0  # for a lost shard to come back somewhere
_WAITED = 0.5  # of the time-out: an answer that comes later is one of a shard that was waiting itself


def server_worker(line: Line, role: Message) -> None:
    """Be a worker until the driver ends."""
    _ServerWorker(line, role).run()


class _ServerWorker:
    """held: the variables that shards hold are the programs' own memory, which every fetch fills."""

    def __init__(self, line: Line, role: Message) -> None:
        fields = role.fields
        self._line = line
        self._fetch_every, self._push_every = fields["fetch_every"], fields["push_every"]
        self._timeout_s: float = fields["timeout_s"]
        self._later: deque[Message] = deque()  # came while a shard was waited for
        self._addresses: list[str] = list(fields["addresses"])
        self._clients: list[ShardClient] = []
        for shard in range(len(self._addresses)):
            self._clients.append(self._client(shard))
        self._shards = ShardClients(self._clients)
        specs = {name: spec for client in self._clients for name, spec in client.variables.items()}
        self._held = {n: torch.empty(specs[n].shape, dtype=specs[n].dtype) for n in fields["held"]}
        own = {n.removeprefix(VARIABLE): t for n, t in role.tensors.items()}
        self._exchanged = tuple(name for client in self._clients for name in client.gradients)
        tables = {name: spec for client in self._clients for name, spec in client.tables.items()}
        self._rows = BatchRows(tables)
        self._gradients = Gradients(self._exchanged, {**own, **self._held}, compile=fields["compile"], say=self._log)
        self._versions: list[int] = []  # of the last fetch
        self._fetched_for = 0  # how many batches were computed since
        self._sums: dict[str, Tensor] = {}  # gradients that are not pushed yet
        self._row_sums: dict[str, Rows] = {}
        self._sums_versions: list[int] = []  # of the variables that the first of them was computed with
        self._unpushed: list[tuple[int, int]] = []  # step and slice of each batch in the sums
        self._sequence = 0

    def run(self) -> None:
        """Do what the driver says."""
        self._line.say(Message("ready"))
        while True:
            message = self._later.popleft() if self._later else self._line.next(LONGEST_WAIT_S)
            if message is None:
                continue
            match message.kind:
                case "program":
                    graph = graph_from_bytes(as_bytes(message.tensors[GRAPH]))
                    self._gradients.load(message.fields["key"], graph)
                    if INDICES in message.tensors:
                        indices = graph_from_bytes(as_bytes(message.tensors[INDICES]))
                        self._rows.load(message.fields["key"], indices)
                case "write":
                    self._take(message)
                    self._versions = []
                case "moved":
                    self._move(message)
                case "batch":
                    self._batch(message)
                case "flush":
                    self._line.say(Message("flushed", self._push(examples=1)))
                case _:
                    raise WorkerError(f"{self._line.name} is a worker, and was told {message.kind!r}.")

    # -- a batch --------------------------------------------------------------------------------------------------

    def _batch(self, message: Message) -> None:
        fields = message.fields
        step, slice_ = fields["step"], fields["slice"]
        self._timeout_s = fields["timeout_s"]
        self._take(message)
        feeds = {n.removeprefix(FEED): t for n, t in message.tensors.items() if n.startswith(FEED)}
        named = self._rows.named(fields["key"], feeds)
        self._fetch(step, named.wanted)
        self._line.progress(f"computing slice {slice_} of step {step}")
        values = self._gradients.values(fields["number"], fields["key"], {**feeds, **named.feeds})
        self._fetched_for += 1
        rows = self._rows.gradients(named, values)
        self._add({name: values.pop(name) for name in self._exchanged}, rows, (step, slice_))
        if len(self._unpushed) >= self._push_every:
            self._line.progress(f"pushing the gradients of step {step}")
            told = self._push(examples=fields["examples"])
        else:
            told = {"pushed": [], "versions": [], "tau": None, "late": False}
        found = {n if n.startswith(NEW) else FETCH + n: value for n, value in values.items()}
        self._line.say(Message("done", {**told, "step": step, "slice": slice_, "tier": self._gradients.tier}, found))

    def _fetch(self, step: int, rows: Mapping[str, Rows]) -> None:
        """Take the variables, if it is time, and the rows of a batch."""
        is_time = not self._versions or self._fetched_for >= self._fetch_every
        if not is_time and not rows:
            return
        self._line.progress(f"fetching the variables for step {step}")
        versions = self._with_shards(partial(self._shards.fetch, self._held if is_time else {}, step, rows))
        if is_time:
            self._versions, self._fetched_for = versions, 0

    def _take(self, message: Message) -> None:
        for name, value in message.tensors.items():
            if name.startswith(VARIABLE):
                self._gradients.variables[name.removeprefix(VARIABLE)].copy_(value)

    def _add(self, gradients: dict[str, Tensor], rows: dict[str, Rows], work: tuple[int, int]) -> None:
        if not self._unpushed:
            self._sums, self._row_sums, self._sums_versions = gradients, rows, self._versions
        else:
            self._sums = {name: self._sums[name] + gradient for name, gradient in gradients.items()}
            self._row_sums = added(self._row_sums, rows)
        self._unpushed.append(work)

    def _push(self, examples: int) -> dict[str, Any]:
        """Returns: the fields of an answer to the driver."""
        self._sequence += 1
        step, slice_ = self._unpushed[-1]
        receipts: list[Receipt] = self._with_shards(
            partial(
                self._shards.push,
                self._sums,
                self._sequence,
                step,
                self._sums_versions,
                slice=slice_,
                examples=examples,
                rows=self._row_sums,
            )
        )
        pushed, self._unpushed, self._sums, self._row_sums = self._unpushed, [], {}, {}
        return {
            "pushed": pushed,
            "versions": [receipt.version for receipt in receipts],
            "tau": max((r.tau for r in receipts if r.tau is not None), default=None),
            "late": any(not r.applied and r.version > step for r in receipts),
        }

    # -- shards that are lost -------------------------------------------------------------------------------------

    def _client(self, shard: int) -> ShardClient:
        while True:
            try:
                address, token = self._addresses[shard], self._line.token
                return ShardClient(address, self._line.name, token, timeout_s=self._timeout_s)
            except WorkerError as error:
                self._complain(shard, error)
                self._wait_for_move({shard})

    def _with_shards(self, ask: Callable[[], list[Any]]) -> list[Any]:
        """What the shards answer, however often one is lost or lets us wait.

        Asking again what was answered is safe: a push counts once. Bounded by the driver's patience with this worker.
        """
        for client in self._clients:
            client.timeout_s = self._timeout_s
        call = ask
        while True:
            began_s = time.monotonic()
            try:
                return call()
            except WorkerError as error:
                lost = {number for number, client in enumerate(self._clients) if not client.connected}
                if not lost and time.monotonic() - began_s < _WAITED * self._timeout_s:
                    raise  # refused
                self._log(str(error))
                call = self._shards.go_on if lost else ask
                for number in lost:
                    self._complain(number, error)
                while lost:
                    lost -= {n for n in self._wait_for_move(lost) if self._clients[n].connected}

    def _complain(self, shard: int, error: WorkerError) -> None:
        told = {"shard": shard, "address": self._addresses[shard], "why": str(error)}
        self._log(f"lost {told}")
        self._line.say(Message("shard_lost", told))

    def _wait_for_move(self, lost: set[int]) -> set[int]:
        """Until the driver says where one of these shards is now. Returns: which has moved."""
        deadline_s = time.monotonic() + _MOVE_S
        while (left_s := deadline_s - time.monotonic()) > 0:
            message = self._line.next(left_s)
            if message is not None and message.kind == "moved":
                self._move(message)
                if message.fields["shard"] in lost:
                    return {message.fields["shard"]}
            elif message is not None:
                self._later.append(message)
        raise WorkerError(
            f"{self._line.name} waited {_MOVE_S:g} s for the driver to say where shard {sorted(lost)} is now. It was "
            f"at {[self._addresses[shard] for shard in sorted(lost)]}."
        )

    def _move(self, message: Message) -> None:
        shard = message.fields["shard"]
        self._addresses[shard] = message.fields["address"]
        if shard >= len(self._clients):
            return  # it is yet to be connected with
        try:
            self._clients[shard].move_to(self._addresses[shard])
        except WorkerError as error:
            self._complain(shard, error)  # it was lost again; there will be another place

    def _log(self, text: str) -> None:
        print(f"{self._line.name}: {text}", file=sys.stderr, flush=True)
