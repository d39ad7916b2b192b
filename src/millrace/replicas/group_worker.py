"""The role of a member of a group of workers over parameter servers.

The group works at one batch, its members at slices of it. The first fetches the variables (of tables, the rows that the
batch names) and gives them to the others: if all fetched, the updates of other groups in between could give them
different versions, and their sum would be the gradient of no point. The members add up their gradients, and the first
pushes the sum, as one worker would.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from millrace.errors import WorkerError
from millrace.graph.save import graph_from_bytes
from millrace.replicas.batch_rows import BatchRows, Named
from millrace.replicas.choose_group import form_group
from millrace.replicas.collective import Group
from millrace.replicas.divided import NEW
from millrace.replicas.elsewhere import programs_elsewhere
from millrace.replicas.group_rows import add_rows, fill, rows_of_all
from millrace.replicas.line import Line
from millrace.replicas.programs import INDICES, as_bytes, pieces_beside
from millrace.replicas.rendezvous import StoreAddress
from millrace.replicas.replica import Gradients
from millrace.replicas.server_client import Receipt
from millrace.replicas.server_worker import FEED, FETCH
from millrace.replicas.settings import Travel
from millrace.replicas.shard_access import ShardAccess
from millrace.replicas.shard_store import Rows
from millrace.replicas.worker import GRAPH, VARIABLE
from millrace.runtime.messages import Message


def group_worker(line: Line, role: Message) -> None:
    """Be a member of a group until the driver ends."""
    _GroupWorker(line, role).run()


class _Broken(Exception):
    """The collective failed: nothing can be done before the driver has decided."""


@dataclass(frozen=True)
class _Slice:
    """slice: its place in the batch. number: of its stream of random numbers. named: the rows that it looks up."""

    slice: int
    key: int
    number: int
    weight: float
    feeds: Mapping[str, Tensor]
    named: Named


@dataclass(frozen=True)
class _Sums:
    """Gradients of a batch: of variables whole, and of rows of tables."""

    dense: Mapping[str, Tensor]
    rows: Mapping[str, Rows]

    @property
    def reduced(self) -> list[Tensor]:
        """What is added up over the group."""
        whole = [self.dense[name] for name in sorted(self.dense) if self.dense[name].is_floating_point()]
        return whole + [self.rows[name].values for name in sorted(self.rows)]


class _GroupWorker:
    """held: the variables that shards hold are the programs' own memory, which every fetch or broadcast fills."""

    def __init__(self, line: Line, role: Message) -> None:
        fields = role.fields
        self._line = line
        self._store, self._travel = StoreAddress(**fields["store"]), Travel(**fields["travel"])
        self._shards = ShardAccess(line, fields["addresses"], fields["timeout_s"])
        specs = {name: spec for client in self._shards.clients for name, spec in client.variables.items()}
        self._held = {n: torch.empty(specs[n].shape, dtype=specs[n].dtype) for n in fields["held"]}
        self._taken = {name: spec for client in self._shards.clients for name, spec in client.gradients.items()}
        self._tables = {name: spec for client in self._shards.clients for name, spec in client.tables.items()}
        self._rows = BatchRows(self._tables)
        own = {n.removeprefix(VARIABLE): t for n, t in role.tensors.items()}
        settings: dict[str, Any] = {"compile": fields["compile"], "say": self._log}
        elsewhere = programs_elsewhere(fields, line, **settings)
        self._gradients = Gradients(tuple(self._taken), {**own, **self._held}, elsewhere=elsewhere, **settings)
        self._group: Group | None = None
        self._sequence = 0

    def run(self) -> None:
        """Do what the driver says."""
        self._line.say(Message("ready"))
        does: dict[str, Callable[[Message], None]] = {
            "program": self._load,
            "write": self._take,
            "form": self._form,
            "batch": self._batch,
            "abandon": self._abandon,
        }
        while True:
            message = self._shards.next()
            if message is None:
                continue
            if message.kind not in does:
                raise WorkerError(f"{self._line.name} is in a group of workers, and was told {message.kind!r}.")
            try:
                does[message.kind](message)
            except _Broken as broken:
                self._log(str(broken))
                self._line.say(Message("broken", {"generation": message.fields["generation"], "why": str(broken)}))

    def _load(self, message: Message) -> None:
        graph = graph_from_bytes(as_bytes(message.tensors[GRAPH]))
        key = message.fields["key"]
        self._gradients.load(key, graph, pieces_beside(message.tensors))
        if INDICES in message.tensors:
            self._rows.load(key, graph_from_bytes(as_bytes(message.tensors[INDICES])))

    def _take(self, message: Message) -> None:
        for name, value in message.tensors.items():
            if name.startswith(VARIABLE):
                self._gradients.variables[name.removeprefix(VARIABLE)].copy_(value)

    # -- the group ------------------------------------------------------------------------------------------------

    def _form(self, message: Message) -> None:
        fields = message.fields
        generation, rank, size = fields["generation"], fields["rank"], fields["size"]
        self._leave()
        self._line.progress(f"forming generation {generation} as rank {rank} of {size}", waits=True)
        with _collective():
            self._group = form_group(self._line, self._store, fields, self._travel)
        self._line.say(Message("formed", {"generation": generation}))

    def _abandon(self, message: Message) -> None:
        self._leave()
        self._line.say(Message("abandoned", {"generation": message.fields["generation"]}))

    def _leave(self) -> None:
        if self._group is not None:
            self._group.abandon()
            self._group = None

    # -- a batch --------------------------------------------------------------------------------------------------

    def _batch(self, message: Message) -> None:
        fields, group = message.fields, self._group
        if group is None:
            return  # it broke when it was formed; the driver will say what is next
        step = fields["step"]
        self._take(message)
        self._shards.timeout_s = fields["timeout_s"]
        group.limit_waits(fields["group_timeout_s"])
        slices = self._slices(message)
        fetched, versions = self._fetch(group, step, [one.named for one in slices], fields["lookups"])
        sums, found = self._compute(step, slices, fetched)
        self._line.progress(f"adding up the gradients of step {step}", waits=True)
        with _collective():
            group.all_reduce(sums.reduced, 1.0)
        told: dict[str, Any] = {"pushed": [], "versions": [], "tau": None, "late": False}
        if group.rank == 0:
            self._line.progress(f"pushing the gradients of step {step}")
            told = self._push(sums, step, versions)
        told |= {"generation": group.generation, "step": step, "slices": fields["slices"]}
        self._line.say(Message("done", {**told, "tier": self._gradients.tier}, found))

    def _slices(self, message: Message) -> list[_Slice]:
        fields, found = message.fields, []
        for slice_, key, number, weight in zip(
            fields["slices"], fields["keys"], fields["numbers"], fields["weights"], strict=True
        ):
            prefix = f"{slice_}/{FEED}"
            feeds = {n.removeprefix(prefix): t for n, t in message.tensors.items() if n.startswith(prefix)}
            found.append(_Slice(slice_, key, number, weight, feeds, self._rows.named(key, feeds)))
        return found

    def _fetch(
        self, group: Group, step: int, named: Sequence[Named], lookups: Sequence[Mapping[str, int]]
    ) -> tuple[dict[str, Rows], list[int]]:
        """Have the variables of a batch, and the rows that the group names.

        Returns: the rows; at the first the version of each shard.
        """
        versions: list[int] = []
        if self._tables:
            self._line.progress(f"telling the rows of step {step}", waits=True)
        with _collective():
            rows = rows_of_all(group, named, lookups, self._tables)
        if group.rank == 0:
            self._line.progress(f"fetching the variables for step {step}")
            versions = self._shards.call(lambda shards: shards.fetch(self._held, step, rows))
        self._line.progress(f"waiting for the variables of step {step}", waits=True)
        with _collective():
            group.broadcast([*(self._held[n] for n in sorted(self._held)), *(rows[n].values for n in sorted(rows))], 0)
        return rows, versions

    def _compute(
        self, step: int, slices: Sequence[_Slice], fetched: Mapping[str, Rows]
    ) -> tuple[_Sums, dict[str, Tensor]]:
        """Returns: the sums of gradients, weighted, and what is to stand beside the answer."""
        dense = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in self._taken.items()}
        sums = _Sums(dense, {name: Rows(r.rows, torch.zeros_like(r.values)) for name, r in fetched.items()})
        found: dict[str, Tensor] = {}
        for one in slices:
            self._line.progress(f"computing slice {one.slice} of step {step}")
            fill(one.named, fetched)
            values = self._gradients.values(one.number, one.key, {**one.feeds, **one.named.feeds})
            add_rows(sums.rows, self._rows.gradients(one.named, values), one.weight)
            for name, total in dense.items():
                value = values.pop(name)
                if value.is_floating_point():
                    total.add_(value, alpha=one.weight)
                elif one.slice == 0:
                    total.copy_(value)
            found |= {f"{one.slice}/{n if n.startswith(NEW) else FETCH + n}": value for n, value in values.items()}
        return sums, found

    def _push(self, sums: _Sums, step: int, versions: list[int]) -> dict[str, Any]:
        self._sequence += 1
        sequence = self._sequence
        receipts: list[Receipt] = self._shards.call(
            lambda shards: shards.push(sums.dense, sequence, step, versions, rows=sums.rows)
        )
        return {
            "pushed": [(step, 0)],
            "versions": [receipt.version for receipt in receipts],
            "tau": max((r.tau for r in receipts if r.tau is not None), default=None),
            "late": False,
        }

    def _log(self, text: str) -> None:
        print(f"{self._line.name}: {text}", file=sys.stderr, flush=True)


@contextmanager
def _collective() -> Iterator[None]:
    """What fails here is the others' fault, or the network's."""
    try:
        yield
    except WorkerError as error:
        raise _Broken(str(error)) from error
