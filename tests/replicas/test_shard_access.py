"""Calls that were begun, and the shard that is lost in one of them: with clients and a driver that are no processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest

from millrace.errors import WorkerError
from millrace.replicas import shard_access
from millrace.replicas.shard_access import Begun, ShardAccess
from millrace.replicas.shard_clients import ShardClients
from millrace.runtime.messages import Message

MOVED = Message("moved", {"shard": 0, "address": "new"})


class _Client:
    """A shard's client, which keeps the question that a lost shard left open, as the real one does."""

    variables: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()

    def __init__(self, address: str, worker: str, token: bytes, *, timeout_s: float) -> None:
        self.connected, self.timeout_s = True, timeout_s
        self.dies_at = ""  # the call in which the shard ends
        self.open = ""
        self.asked: list[str] = []

    def start(self, name: str) -> None:
        if self.open:
            raise WorkerError(f"it has not finished {self.open} yet")
        self.open = name
        self.connected = self.connected and name != self.dies_at
        self._ask()

    def finish(self, name: str) -> str:
        if self.open != name:
            raise WorkerError(f"it waits for no {name}")
        if not self.connected:
            raise WorkerError("the shard ended")
        self.open = ""
        return f"answer to {name}"

    def move_to(self, address: str) -> None:
        self.connected, self.dies_at = True, ""
        if self.open:
            self._ask()

    def _ask(self) -> None:
        if not self.connected:
            raise WorkerError("the shard ended")
        self.asked.append(self.open)


class _Line:
    name, token = "m0", b""

    def __init__(self) -> None:
        self.said: list[Message] = []
        self.to_come: deque[Message] = deque()

    def say(self, message: Message) -> None:
        self.said.append(message)

    def next(self, timeout_s: float) -> Message | None:
        if not self.to_come:
            assert self.said, "waits for a move that nobody was asked for"
            return MOVED
        return self.to_come.popleft()


def begin(access: ShardAccess, name: str) -> Begun:
    def ask(shards: ShardClients) -> list[Any]:
        clients: Sequence[Any] = shards.clients
        return shards._all([(lambda c=c: c.finish(name), lambda c=c: c.start(name)) for c in clients])  # type: ignore

    return access.begin(ask)


@pytest.mark.parametrize("moved_before", [False, True], ids=["moved when it is waited for", "moved before"])
@pytest.mark.parametrize("lost_in", ["fetch 2", "push 1", "fetch 3"])
@pytest.mark.parametrize("in_order", [True, False])
def test_what_was_begun_gets_its_own_answer(
    moved_before: bool, lost_in: str, in_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls of a worker that overlaps, in its order, or with pushes that are finished later."""
    monkeypatch.setattr(shard_access, "ShardClient", _Client)
    line: Any = _Line()
    access = ShardAccess(line, ["old"], timeout_s=60.0, ways=2)
    client: Any = access._clients[1][0]
    client.dies_at = lost_in
    fetch2, push1 = begin(access, "fetch 2"), begin(access, "push 1")
    access._await(1)
    if moved_before and lost_in != "fetch 3":
        line.to_come.append(MOVED)
        assert access.next() is None
    assert access.finish(fetch2) == ["answer to fetch 2"]
    fetch3 = begin(access, "fetch 3")
    access._await(1)
    if in_order:
        assert access.finish(push1) == ["answer to push 1"]
    push2 = begin(access, "push 2")
    assert access.finish(fetch3) == ["answer to fetch 3"]
    if not in_order:
        assert access.finish(push1) == ["answer to push 1"]
    assert access.finish(push2) == ["answer to push 2"]
    assert client.asked == ["fetch 2", "push 1", "fetch 3", "push 2"]
