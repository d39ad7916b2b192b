"""A worker's side of all parameter servers of a run: every shard is asked before any answer is waited for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from millrace.errors import FeedError, WorkerError
from millrace.replicas.server_client import Receipt, ShardClient
from millrace.replicas.shard_store import Rows


class ShardClients:
    """The shards that hold a run's variables between them.

    When a call raises because a shard has ended, the others have done their part. Move that shard's client to the new
    address (`clients[i].move_to(address)`), then `go_on()`: it waits for the rest and returns what the call
    would have.
    """

    def __init__(self, clients: Sequence[ShardClient]) -> None:
        self.clients = tuple(clients)
        self._left: dict[int, Callable[[], Any]] = {}  # shard -> waits for its answer
        self._done: dict[int, Any] = {}

    def fetch(self, into: Mapping[str, Tensor], step: int = 0, rows: Mapping[str, Rows] | None = None) -> list[int]:
        """Copy variables, and rows of tables, from all shards.

        Args: as `ShardClient.fetch`. Returns: the version of each shard. Raises: as `ShardClient.fetch`.
        """
        given = rows or {}
        parts = [{n: t for n, t in into.items() if n in client.variables} for client in self.clients]
        tables = [{n: r for n, r in given.items() if n in client.tables} for client in self.clients]
        known = {name for client in self.clients for name in (*client.variables, *client.tables)}
        missing = (into.keys() | given.keys()) - known
        if missing:
            raise FeedError(f"no shard holds {', '.join(sorted(missing))}.")
        return self._all(
            [
                (client.finish_fetch, partial(client.start_fetch, part, step, named))
                for client, part, named in zip(self.clients, parts, tables, strict=True)
            ]
        )

    def push(
        self,
        gradients: Mapping[str, Tensor],
        sequence: int,
        step: int,
        versions: Sequence[int],
        *,
        slice: int = 0,
        examples: int = 1,
        rows: Mapping[str, Rows] | None = None,
    ) -> list[Receipt]:
        """Give every shard its gradients. versions: as `fetch` returned them. Otherwise as `ShardClient.push`."""
        given = rows or {}

        def start(client: ShardClient, version: int) -> None:
            mine = {name: gradients[name] for name in client.gradients if name in gradients}
            tables = {table: part for table, part in given.items() if table in client.tables}
            client.start_push(mine, sequence, step, version, slice=slice, examples=examples, rows=tables)

        return self._all([(c.finish_push, partial(start, c, v)) for c, v in zip(self.clients, versions, strict=True)])

    def go_on(self) -> list[Any]:
        """Wait for what is left of the last call, after the failed shard's client was moved.

        The first failure is raised at once: whoever waits for us hears of it before it waits for other shards, too.
        """
        for number, finish in list(self._left.items()):
            self._done[number] = finish()
            del self._left[number]
        return [self._done[number] for number in sorted(self._done)]

    def close(self) -> None:
        """End all connections."""
        for client in self.clients:
            client.close()

    def _all(self, calls: Sequence[tuple[Callable[[], Any], Callable[[], None]]]) -> list[Any]:
        self._left, self._done = {}, {}
        failures: list[WorkerError] = []
        for number, (finish, start) in enumerate(calls):
            self._left[number] = finish
            try:
                start()
            except WorkerError as error:
                failures.append(error)  # it is asked again when it has moved
        if not failures:
            return self.go_on()
        with contextlib.suppress(WorkerError):
            self.go_on()
        raise failures[0]
