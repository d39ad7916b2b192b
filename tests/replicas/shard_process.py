"""Processes to be killed: shards that count updates, and a worker that pushes as fast as it can.

They are forked from one that has everything imported, so that a test does not wait for imports.
"""

from __future__ import annotations

import multiprocessing
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tests.replicas.counting import TOKEN, attach_copy, connected, counting_server

from millrace.replicas.shard_events import Async, Sync
from millrace.runtime import handshake

START_S = 60.0  # for the first import on a busy machine
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])


class ChildProcess:
    """A process with a pipe to it; `wait` hears what it says next."""

    def __init__(self, target: Any, *arguments: Any) -> None:
        self._pipe, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=target, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def wait(self) -> Any:
        assert self._pipe.poll(START_S), "it says nothing"
        return self._pipe.recv()

    def tell(self, **said: Any) -> None:
        """Tell it something, and wait until it has done it."""
        self._pipe.send(said)
        assert self.wait() == "ok"

    def rest(self) -> list[Any]:
        """What it said before it ended."""
        found = []
        while True:
            try:
                found.append(self._pipe.recv())
            except EOFError:
                return found

    def kill(self) -> None:
        self._process.kill()
        self._process.join(10.0)


class ShardProcess(ChildProcess):
    """A shard, or the process that holds the copy of one. needed: 0 for asynchronous."""

    def __init__(self, directory: Path, name: str, size: int, needed: int = 0, *, copy: bool = False) -> None:
        self.address = f"unix:{directory / name}"
        super().__init__(_serve, name, self.address, size, needed, copy)


def _serve(pipe: Connection, who: str, address: str, size: int, needed: int, copy: bool) -> None:
    torch.set_num_threads(1)
    policy = Sync(needed) if needed else Async()
    server = counting_server(who, {"a": size}, policy, ("w0", "w1"), is_copy=copy)
    listener = handshake.listen(address)
    threading.Thread(target=server.serve, args=(listener, TOKEN), daemon=True).start()
    pipe.send("ok")
    while True:
        said = pipe.recv()
        if "attach" in said:
            attach_copy(server, said["attach"])
        else:
            server.promote()
        pipe.send("ok")


def push_for_ever(pipe: Connection, address: str, size: int) -> None:
    """A worker that says the number of each push that was acknowledged."""
    client, sequence = connected(address, "w0"), 0
    while True:
        sequence += 1
        client.push({"a": torch.ones(size)}, sequence, 0, 0)
        pipe.send(sequence)
