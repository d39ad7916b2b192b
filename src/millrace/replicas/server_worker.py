"""The role of a worker of parameter servers: fetch variables, compute the gradients of a batch, push them.

With `overlap` what is pushed and fetched travels while the next batch is computed:

    computing     | batch 1      | batch 2            | batch 3
    behind it     | fetch for 2  | push 1, fetch for 3 | push 2, fetch for 4

Rows of tables are fetched when their batch is there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from millrace.errors import WorkerError
from millrace.graph.save import graph_from_bytes
from millrace.replicas.batch_rows import BatchRows, added
from millrace.replicas.divided import NEW
from millrace.replicas.elsewhere import programs_elsewhere
from millrace.replicas.line import Line
from millrace.replicas.programs import INDICES, as_bytes, pieces_beside
from millrace.replicas.replica import Gradients
from millrace.replicas.server_client import Receipt
from millrace.replicas.shard_access import Begun, ShardAccess
from millrace.replicas.shard_clients import ShardClients
from millrace.replicas.shard_store import Rows
from millrace.replicas.worker import GRAPH, VARIABLE
from millrace.runtime.messages import Message

FEED, FETCH = "feed/", "fetch/"  # begin the names of tensors beside messages

_NOTHING: Mapping[str, Any] = {"pushed": [], "versions": [], "tau": None, "late": False}

Work = tuple[int, int]  # step, slice


def server_worker(line: Line, role: Message) -> None:
    """Be a worker until the driver ends."""
    _ServerWorker(line, role).run()


@dataclass(frozen=True)
class _Sums:
    """Gradients that are not pushed yet.

    versions: of the variables that the first of them were computed with. work: the batches in them.
    """

    dense: Mapping[str, Tensor]
    rows: Mapping[str, Rows]
    versions: list[int]
    work: tuple[Work, ...]

    def plus(self, other: _Sums) -> _Sums:
        dense = {name: self.dense[name] + gradient for name, gradient in other.dense.items()}
        return _Sums(dense, added(self.rows, other.rows), self.versions, (*self.work, *other.work))


class _ServerWorker:
    """held: the variables that shards hold are the programs' own memory, which every fetch fills; with `overlap` there
    are two of each, and the programs use the one that is not being filled."""

    def __init__(self, line: Line, role: Message) -> None:
        fields = role.fields
        self._line = line
        self._fetch_every, self._push_every = fields["fetch_every"], fields["push_every"]
        self._overlap: bool = fields["overlap"]
        self._sync: bool = fields["sync"]
        self._shards = ShardAccess(line, fields["addresses"], fields["timeout_s"], ways=2 if self._overlap else 1)
        clients = self._shards.clients
        specs = {name: spec for client in clients for name, spec in client.variables.items()}
        self._held = [
            {name: torch.empty(specs[name].shape, dtype=specs[name].dtype) for name in fields["held"]}
            for _ in range(2 if self._overlap else 1)
        ]
        own = {n.removeprefix(VARIABLE): t for n, t in role.tensors.items()}
        self._exchanged = tuple(name for client in clients for name in client.gradients)
        self._rows = BatchRows({name: spec for client in clients for name, spec in client.tables.items()})
        held = self._held[0]
        settings: dict[str, Any] = {"compile": fields["compile"], "say": self._log}
        elsewhere = programs_elsewhere(fields, line, **settings)
        self._gradients = Gradients(self._exchanged, {**own, **held}, elsewhere=elsewhere, **settings)
        self._versions: list[int] = []  # of the last fetch
        self._fetched_for = 0  # how many batches were computed since
        self._coming: Begun | None = None  # a fetch into the other side
        self._sums: _Sums | None = None
        self._pushing: tuple[Begun, _Sums] | None = None
        self._sequence = 0

    def run(self) -> None:
        """Do what the driver says."""
        self._line.say(Message("ready"))
        while True:
            message = self._shards.next()
            if message is None:
                continue
            match message.kind:
                case "program":
                    self._load(message)
                case "write":
                    self._take(message)
                    self._forget()
                case "batch":
                    self._batch(message)
                case "flush":
                    self._flush()
                case _:
                    raise WorkerError(f"{self._line.name} is a worker, and was told {message.kind!r}.")

    def _load(self, message: Message) -> None:
        key = message.fields["key"]
        self._gradients.load(key, graph_from_bytes(as_bytes(message.tensors[GRAPH])), pieces_beside(message.tensors))
        if INDICES in message.tensors:
            self._rows.load(key, graph_from_bytes(as_bytes(message.tensors[INDICES])))

    def _take(self, message: Message) -> None:
        for name, value in message.tensors.items():
            if name.startswith(VARIABLE):
                self._gradients.variables[name.removeprefix(VARIABLE)].copy_(value)

    # -- a batch --------------------------------------------------------------------------------------------------

    def _batch(self, message: Message) -> None:
        fields = message.fields
        step, slice_ = fields["step"], fields["slice"]
        self._shards.timeout_s = fields["timeout_s"]
        self._take(message)
        feeds = {n.removeprefix(FEED): t for n, t in message.tensors.items() if n.startswith(FEED)}
        named = self._rows.named(fields["key"], feeds)
        self._fetch(step, named.wanted)
        self._line.progress(f"computing slice {slice_} of step {step}")
        values = self._gradients.values(fields["number"], fields["key"], {**feeds, **named.feeds})
        self._fetched_for += 1
        rows = self._rows.gradients(named, values)
        dense = {name: values.pop(name) for name in self._exchanged}
        sums = _Sums(dense, rows, self._versions, ((step, slice_),))
        self._sums = sums if self._sums is None else self._sums.plus(sums)
        found = {n if n.startswith(NEW) else FETCH + n: value for n, value in values.items()}
        if self._sync:  # first its results: once others have its gradients, they must not be lost with it
            self._line.say(Message("computed", {"step": step, "slice": slice_}, found))
            found = {}
        told = _NOTHING
        if len(self._sums.work) >= self._push_every:
            self._line.progress(f"pushing the gradients of step {step}")
            told = self._pushed()  # the one before
            self._push(fields["examples"])
            if not self._overlap:
                told = self._pushed()
        self._line.say(Message("done", {**told, "step": step, "slice": slice_, "tier": self._gradients.tier}, found))

    # -- fetching -------------------------------------------------------------------------------------------------

    def _fetch(self, step: int, rows: Mapping[str, Rows]) -> None:
        """Have the variables of a batch, anew if it is time, and the rows that it names."""
        is_time = not self._versions or self._fetched_for >= self._fetch_every
        self._line.progress(f"fetching the variables for step {step}")
        if is_time and self._coming is not None:
            self._versions, self._coming = self._shards.finish(self._coming), None
            self._held.reverse()
            self._gradients.use(self._held[0])
            self._fetched_for, is_time = 0, False
        if is_time or rows:
            held = self._held[0] if is_time else {}
            versions = self._shards.call(lambda shards: shards.fetch(held, step, rows))
            if is_time:
                self._versions, self._fetched_for = versions, 0
        if self._overlap and self._coming is None and self._fetched_for + 1 >= self._fetch_every:
            other = self._held[1]
            self._coming = self._shards.begin(lambda shards: shards.fetch(other))

    def _forget(self) -> None:
        """The variables have other values."""
        if self._coming is not None:
            self._shards.finish(self._coming)
        self._versions, self._coming = [], None

    # -- pushing --------------------------------------------------------------------------------------------------

    def _push(self, examples: int) -> None:
        """Begin to push what there is."""
        assert self._sums is not None
        self._sequence += 1
        sums, self._sums = self._sums, None
        step, slice_ = sums.work[-1]
        push = partial(
            ShardClients.push,
            gradients=sums.dense,
            sequence=self._sequence,
            step=step,
            versions=sums.versions,
            slice=slice_,
            examples=examples,
            rows=sums.rows,
        )
        self._pushing = (self._shards.begin(push), sums)

    def _pushed(self) -> Mapping[str, Any]:
        """What became of the push that was begun, as fields of an answer to the driver."""
        if self._pushing is None:
            return _NOTHING
        begun, sums = self._pushing
        receipts: list[Receipt] = self._shards.finish(begun)
        self._pushing = None
        return {
            "pushed": sums.work,
            "versions": [receipt.version for receipt in receipts],
            "tau": max((r.tau for r in receipts if r.tau is not None), default=None),
            "late": any(not r.applied and r.version > sums.work[-1][0] for r in receipts),
        }

    def _flush(self) -> None:
        """Push what is left; one push, as the driver asks again while there is more."""
        if self._pushing is None:
            self._push(examples=1)
        self._line.say(Message("flushed", self._pushed()))

    def _log(self, text: str) -> None:
        print(f"{self._line.name}: {text}", file=sys.stderr, flush=True)
