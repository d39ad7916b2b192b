"""Shards whose variables count the updates: plain SGD with rate -1, to which ones are pushed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from millrace.graph.graph import Graph
from millrace.graph.passes.row_update import row_update
from millrace.graph.trace import trace
from millrace.replicas.server import ShardServer
from millrace.replicas.server_client import ShardClient
from millrace.replicas.shard_events import Async, Policy
from millrace.replicas.shard_store import ShardStore
from millrace.runtime import handshake

TOKEN = bytes(range(32))


def connected(address: str, worker: str, timeout_s: float = 10.0) -> ShardClient:
    """A worker's end."""
    return ShardClient(address, worker, TOKEN, timeout_s=timeout_s)


def attach_copy(shard: ShardServer, address: str, wait_s: float = 20.0) -> None:
    """Let a shard have its copy at an address."""
    shard.attach_copy(handshake.dial(address, TOKEN, {"shard": "shard"}, 10.0), "copy", wait_s)


def adding(variables: Mapping[str, Tensor], tables: Mapping[str, Tensor]) -> Graph:
    """An update that adds what is pushed: whole gradients of the variables' names, rows of the tables."""
    feeds = {name: name for name in variables} | {f"gradient/{name}": name for name in tables}
    held = {**variables, **tables}

    def step(held: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        for feed, name in feeds.items():
            held[name].add_(gradients[feed])
        return {}

    graph = trace(step, dict(held), {feed: torch.zeros_like(held[name]) for feed, name in feeds.items()})
    return row_update(graph, dict.fromkeys(tables, 2))


def counting_server(
    who: str,
    sizes: Mapping[str, int],
    policy: Policy | None = None,
    workers: tuple[str, ...] = (),
    *,
    tables: Mapping[str, tuple[int, int]] | None = None,
    is_copy: bool = False,
) -> ShardServer:
    """A server of zeros. sizes: elements of every variable. tables: rows and width of every table."""
    variables = {name: torch.zeros(size) for name, size in sizes.items()}
    rows = {name: torch.zeros(shape) for name, shape in (tables or {}).items()}
    store = ShardStore(who, variables | rows, adding(variables, rows))
    return ShardServer(store, policy or Async(), workers, is_copy=is_copy, patience_s=5.0)


@contextlib.contextmanager
def served(server: ShardServer, address: str) -> Iterator[str]:
    """Serve in a thread. Yields: the address."""
    listener = handshake.listen(address)
    thread = threading.Thread(target=server.serve, args=(listener, TOKEN), daemon=True)
    thread.start()
    try:
        yield listener.address
    finally:
        server.close()
        thread.join(5.0)


def address_in(directory: Path, kind: str, name: str = "shard") -> str:
    """An address of a kind, "unix" or "tcp"."""
    return f"unix:{directory / name}" if kind == "unix" else "tcp:127.0.0.1:0"
