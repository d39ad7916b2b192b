"""The role of a member of a group of workers over parameter servers.

The group works at one batch, its members at slices of it. The first fetches the variables and gives them to the others:
if all fetched, the updates of other groups in between could give them different versions, and their sum would be the
gradient of no point. The members add up their gradients, and the first pushes the sum, as one worker would.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from millrace.errors import WorkerError
from millrace.graph.save import graph_from_bytes
from millrace.replicas.collective import Group
from millrace.replicas.divided import NEW, DividedPrograms
from millrace.replicas.gloo_group import GlooGroup
from millrace.replicas.line import LOOPBACK, Line
from millrace.replicas.programs import as_bytes, pieces_beside
from millrace.replicas.rendezvous import StoreAddress
from millrace.replicas.replica import Gradients
from millrace.replicas.server_client import Receipt
from millrace.replicas.server_worker import FEED, FETCH
from millrace.replicas.shard_access import ShardAccess
from millrace.replicas.shared_group import SharedGroup
from millrace.replicas.worker import GRAPH, VARIABLE
from millrace.runtime.messages import Message


def group_worker(line: Line, role: Message) -> None:
    """Be a member of a group until the driver ends."""
    _GroupWorker(line, role).run()


class _Broken(Exception):
    """The collective failed: nothing can be done before the driver has decided."""


class _GroupWorker:
    """held: the variables that shards hold are the programs' own memory, which every fetch or broadcast fills."""

    def __init__(self, line: Line, role: Message) -> None:
        fields = role.fields
        self._line = line
        self._store = StoreAddress(**fields["store"])
        self._shards = ShardAccess(line, fields["addresses"], fields["timeout_s"])
        specs = {name: spec for client in self._shards.clients for name, spec in client.variables.items()}
        self._held = {n: torch.empty(specs[n].shape, dtype=specs[n].dtype) for n in fields["held"]}
        self._taken = {name: spec for client in self._shards.clients for name, spec in client.gradients.items()}
        own = {n.removeprefix(VARIABLE): t for n, t in role.tensors.items()}
        settings: dict[str, Any] = {"compile": fields["compile"], "say": self._log}
        divided = DividedPrograms(fields["devices"], line, **settings) if fields["devices"] else None
        self._gradients = Gradients(tuple(self._taken), {**own, **self._held}, divided=divided, **settings)
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
        self._gradients.load(message.fields["key"], graph, pieces_beside(message.tensors))

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
        kind = SharedGroup if fields["one_host"] else partial(GlooGroup, host=self._line.host or LOOPBACK)
        with _collective():
            self._group = kind(
                self._store,
                generation,
                rank,
                size,
                abandoned=lambda: self._line.abandoned(generation),
                timeout_s=fields["timeout_s"],
            )
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
        versions: list[int] = []
        if group.rank == 0:
            self._line.progress(f"fetching the variables for step {step}")
            versions = self._shards.call(lambda shards: shards.fetch(self._held, step))
        group.limit_waits(fields["group_timeout_s"])
        self._line.progress(f"waiting for the variables of step {step}", waits=True)
        with _collective():
            group.broadcast([self._held[name] for name in sorted(self._held)], 0)
        sums, found = self._compute(message)
        self._line.progress(f"adding up the gradients of step {step}", waits=True)
        with _collective():
            group.all_reduce([sums[name] for name in sorted(sums) if sums[name].is_floating_point()], 1.0)
        told: dict[str, Any] = {"pushed": [], "versions": [], "tau": None, "late": False}
        if group.rank == 0:
            self._line.progress(f"pushing the gradients of step {step}")
            told = self._push(sums, step, versions)
        told |= {"generation": group.generation, "step": step, "slices": fields["slices"]}
        self._line.say(Message("done", {**told, "tier": self._gradients.tier}, found))

    def _compute(self, message: Message) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns: the sums of gradients, weighted, and what is to stand beside the answer."""
        fields = message.fields
        sums = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in self._taken.items()}
        found: dict[str, Tensor] = {}
        for slice_, key, number, weight in zip(
            fields["slices"], fields["keys"], fields["numbers"], fields["weights"], strict=True
        ):
            self._line.progress(f"computing slice {slice_} of step {fields['step']}")
            prefix = f"{slice_}/{FEED}"
            feeds = {n.removeprefix(prefix): t for n, t in message.tensors.items() if n.startswith(prefix)}
            values = self._gradients.values(number, key, feeds)
            for name, total in sums.items():
                value = values.pop(name)
                if value.is_floating_point():
                    total.add_(value, alpha=weight)
                elif slice_ == 0:
                    total.copy_(value)
            found |= {f"{slice_}/{n if n.startswith(NEW) else FETCH + n}": value for n, value in values.items()}
        return sums, found

    def _push(self, sums: dict[str, Tensor], step: int, versions: list[int]) -> dict[str, Any]:
        self._sequence += 1
        sequence = self._sequence
        receipts: list[Receipt] = self._shards.call(lambda shards: shards.push(sums, sequence, step, versions))
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
