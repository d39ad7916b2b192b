"""A session over parameter servers whose workers are groups of processes; see `grouped_pool` and `group_worker`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Unpack

from torch import Tensor

from millrace.graph.graph import Graph
from millrace.replicas.grouped_pool import GroupedPool
from millrace.replicas.hub import Hub
from millrace.replicas.members_session import MembersSettings
from millrace.replicas.open_step import OpenStep
from millrace.replicas.protocol import Fields, Resized
from millrace.replicas.rendezvous import Rendezvous
from millrace.replicas.server_session import ServerSession
from millrace.replicas.server_worker import FEED
from millrace.replicas.settings import Hybrid, Travel
from millrace.replicas.suspicion import GROUP_WAITS
from millrace.replicas.worker import VARIABLE
from millrace.runtime.messages import Message


class HybridSession(ServerSession):
    """Runs steps in groups of replicas, which push to servers without waiting for each other.

    A step is one batch, of which every replica of a group computes a slice.

    Args: rendezvous: where the members of a group find each other; the session closes it. replicas: in each group.
        travel: how gradients do inside a group. The others are those of `ServerSession`.
    """

    def __init__(
        self,
        graph: Graph,
        hub: Hub,
        rendezvous: Rendezvous,
        update: Hybrid,
        *,
        replicas: int,
        spares: int = 1,
        travel: Travel | None = None,
        **settings: Unpack[MembersSettings],
    ) -> None:
        self._rendezvous, self._travel = rendezvous, travel or Travel()
        super().__init__(graph, hub, update, replicas=replicas, spares=spares, **settings)

    def _new_pool(self) -> GroupedPool:
        return GroupedPool(self._sizes)

    def begin_again(self) -> None:
        """See `RemoteSession.begin_again`."""
        self._rendezvous.close()
        self._rendezvous = Rendezvous(self._rendezvous.host)
        super().begin_again()

    def _resize(self, replicas: int) -> None:
        """From now on have so many groups, each as large as they are. More are started and fetch the variables from the
        servers, or the last ones end when they have pushed what they are at."""
        self._sizes = replace(self._sizes, workers=replicas)
        self._decide(Resized(replicas))

    def close(self) -> None:
        """End the processes; what they hold of the variables goes with them."""
        super().close()
        self._rendezvous.close()

    def _is_done(self, step: int, slices: Sequence[int]) -> None:
        # To the pool a batch is one slice. Of a member that was lost after its group's push nothing may have come.
        super()._is_done(step, sorted(self._open[step].results))

    def _keep_results(self, step: OpenStep, message: Message) -> None:
        if message.fields["generation"] != step.generation:
            return  # of a group that was given up meanwhile
        for slice_ in message.fields["slices"]:
            prefix = f"{slice_}/"
            found = {n.removeprefix(prefix): t for n, t in message.tensors.items() if n.startswith(prefix)}
            step.results[slice_] = found

    def _worker_settings(self) -> dict[str, Any]:
        return {"store": asdict(self._rendezvous.address), "travel": asdict(self._travel)}

    def _prepare(self, member: str, kind: str, fields: Fields) -> None:
        if kind == "batch":
            parts = self._open[fields["step"]].parts
            for slice_ in fields["slices"]:
                if slice_ < len(parts):
                    self._load(member, parts[slice_][0])

    def _tell(self, member: str, kind: str, fields: dict[str, Any]) -> None:
        if kind == "form":
            fields |= self._meeting(fields.pop("members"))
            fields["timeout_s"] = GROUP_WAITS * min(self._within_s("form"), self._within_s("step"))
        super()._tell(member, kind, fields)

    def _batch(self, member: str, fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        step = fields["step"]
        wanted = self._open[step]
        if wanted.generation != fields["generation"]:  # who takes part in it is told so at once
            wanted.generation, wanted.results, wanted.given = fields["generation"], {}, self._kept.given()
        parts = {slice_: wanted.parts[slice_] for slice_ in fields["slices"] if slice_ < len(wanted.parts)}
        total = sum(size for _, _, size in wanted.parts)
        self._began_s[member] = time.monotonic()
        fields |= {
            "lookups": [self._lookups(wanted, share) for share in fields.pop("shares")],
            "slices": list(parts),
            "keys": [key for key, _, _ in parts.values()],
            "numbers": [step * self._replicas + slice_ for slice_ in parts],  # of the streams of random numbers
            "weights": [size / total for _, _, size in parts.values()],
            "timeout_s": self._patience_s / 2,  # of a shard
            "group_timeout_s": GROUP_WAITS * self._within_s("step"),
        }
        tensors = {
            f"{slice_}/{FEED}{name}": feed for slice_, (_, feeds, _) in parts.items() for name, feed in feeds.items()
        }
        return fields, tensors | {VARIABLE + name: value for name, value in wanted.given.items()}

    def _lookups(self, step: OpenStep, slices: Sequence[int]) -> Mapping[str, int]:
        """How many indices of each table a member has with these slices of the batch."""
        keys = [step.parts[slice_][0] for slice_ in slices if slice_ < len(step.parts)]
        return {table: sum(self._programs.lookups(key)[table] for key in keys) for table in self.tables}
