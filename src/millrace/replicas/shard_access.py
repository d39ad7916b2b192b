"""A worker's shards, whoever holds them: what fails because one was lost is asked again where it is next.

The driver says where that is. Calls on different ways may run at the same time: each has connections of its own.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from typing import Any

from millrace.errors import WorkerError
from millrace.replicas.line import Line
from millrace.replicas.server_client import ShardClient
from millrace.replicas.shard_clients import ShardClients
from millrace.runtime.messages import LONGEST_WAIT_S, Message

_MOVE_S = 3600.0  # for a lost shard to come back somewhere, or to send its copy all it has; the driver ends it sooner
_WAITED = 0.5  # of the time-out: an answer that comes later is one of a shard that was waiting itself

Ask = Callable[[ShardClients], list[Any]]


@dataclass(frozen=True)
class _Failed:
    """error: of a call. lost: the shards with which there was no connection then."""

    error: WorkerError
    lost: frozenset[int]


@dataclass(eq=False)
class Begun:
    """A call that runs by itself, or has. found: what the shards answered, or how it failed."""

    ask: Ask
    way: int
    found: Future[list[Any] | _Failed]


class ShardAccess:
    """Connections with all shards.

    Args:
        addresses: where the shards are at first.
        timeout_s: that a shard may take for an answer; may be changed between calls.
        ways: how many calls there may be at once. Way 0 is the caller's own thread, the others have theirs.
    """

    def __init__(self, line: Line, addresses: Sequence[str], timeout_s: float, ways: int = 1) -> None:
        self.timeout_s = timeout_s
        self._line = line
        self._addresses = list(addresses)
        self._later: deque[Message] = deque()  # came while a shard was waited for
        self._clients: list[list[ShardClient]] = [[] for _ in range(ways)]
        self._last: list[Future[Any] | None] = [None] * ways
        self._begun: deque[Begun] = deque()  # on the last way, in their order; not finished
        self._failed = False  # one of these, and the shards' answers to it are still owed: `finish` asks again
        self._threads = [ThreadPoolExecutor(1, f"way {way}") for way in range(1, ways)]
        for clients in self._clients:
            for shard in range(len(addresses)):
                clients.append(self._client(shard))
        self._shards = [ShardClients(clients) for clients in self._clients]

    @property
    def clients(self) -> Sequence[ShardClient]:
        """One for each shard, for what it holds and takes."""
        return self._clients[0]

    def next(self) -> Message | None:
        """The driver's next message, as `Line.next`, but for those that are for this object."""
        message = self._later.popleft() if self._later else self._line.next(LONGEST_WAIT_S)
        if message is not None and message.kind == "moved":
            self._move(message)
            return None
        return message

    def call(self, ask: Ask) -> list[Any]:
        """What the shards answer, however often one is lost or lets us wait.

        Asking again what was answered is safe: a push counts once. Bounded by the driver's patience with this worker.
        """
        return self._found(self._attempt(ask, 0), ask, 0)

    def begin(self, ask: Ask) -> Begun:
        """The same on the last way, after what was begun there before; `finish` gives the answer. With one way alone
        it is done now."""
        way = len(self._clients) - 1
        begun = Begun(ask, way, Future())
        if way:
            self._submit(begun)
            self._begun.append(begun)
        else:
            begun.found.set_result(self.call(ask))
        return begun

    def finish(self, begun: Begun) -> list[Any]:
        """Wait for it, and for what was begun before it. A shard that was lost meanwhile is asked again from here."""
        while begun in self._begun:
            first = self._begun.popleft()
            found = first.found.result()
            if isinstance(found, _Failed):
                answers = self._found(found, first.ask, first.way)
                first.found = Future()
                first.found.set_result(answers)
                self._failed = False
                for later in self._begun:  # did not run
                    self._submit(later)
        answer = begun.found.result()
        assert not isinstance(answer, _Failed)
        return answer

    # -- shards that are lost -------------------------------------------------------------------------------------

    def _attempt(self, ask: Ask, way: int) -> list[Any] | _Failed:
        clients, began_s = self._clients[way], time.monotonic()
        for client in clients:
            client.timeout_s = self.timeout_s
        try:
            return ask(self._shards[way])
        except WorkerError as error:
            lost = frozenset(number for number, client in enumerate(clients) if not client.connected)
            if not lost and time.monotonic() - began_s < _WAITED * self.timeout_s:
                raise  # refused
            return _Failed(error, lost)

    def _submit(self, begun: Begun) -> None:
        begun.found = self._threads[begun.way - 1].submit(self._attempt_behind, begun.ask, begun.way)
        self._last[begun.way] = begun.found

    def _attempt_behind(self, ask: Ask, way: int) -> list[Any] | _Failed:
        if self._failed:  # another call would take the place of the one that is to be asked again
            return _Failed(WorkerError("what was begun before it has failed"), frozenset())
        found = self._attempt(ask, way)
        self._failed = isinstance(found, _Failed)
        return found

    def _found(self, found: list[Any] | _Failed, ask: Ask, way: int) -> list[Any]:
        clients = self._clients[way]
        while isinstance(found, _Failed):
            self._log(str(found.error))
            lost = {number for number in found.lost if not clients[number].connected}
            for number in lost:
                self._complain(number, found.error)
            while lost:
                self._wait_for_move(lost)
                lost = {number for number in lost if not clients[number].connected}
            self._await(way)
            found = self._attempt(ShardClients.go_on if found.lost else ask, way)
        return found

    def _client(self, shard: int) -> ShardClient:
        while True:
            try:
                address, token = self._addresses[shard], self._line.token
                return ShardClient(address, self._line.name, token, timeout_s=self.timeout_s)
            except WorkerError as error:
                self._complain(shard, error)
                self._wait_for_move({shard})

    def _complain(self, shard: int, error: WorkerError) -> None:
        told = {"shard": shard, "address": self._addresses[shard], "why": str(error)}
        self._log(f"lost {told}")
        self._line.say(Message("shard_lost", told))

    def _wait_for_move(self, lost: set[int]) -> None:
        """Until the driver has said where one of these shards is now."""
        deadline_s = time.monotonic() + _MOVE_S
        while (left_s := deadline_s - time.monotonic()) > 0:
            message = self._line.next(left_s)
            if message is not None and message.kind == "moved":
                self._move(message)
                if message.fields["shard"] in lost:
                    return
            elif message is not None:
                self._later.append(message)
        raise WorkerError(
            f"{self._line.name} waited {_MOVE_S:g} s for the driver to say where shard {sorted(lost)} is now. It was "
            f"at {[self._addresses[shard] for shard in sorted(lost)]}."
        )

    def _move(self, message: Message) -> None:
        shard = message.fields["shard"]
        self._addresses[shard] = message.fields["address"]
        for way, clients in enumerate(self._clients):
            if shard >= len(clients):
                continue  # it is yet to be connected with
            self._await(way)
            try:
                clients[shard].move_to(self._addresses[shard])
            except WorkerError as error:
                self._complain(shard, error)  # it was lost again; there will be another place

    def _await(self, way: int) -> None:
        """Until nothing runs on a way. Bounded, as every call is."""
        last = self._last[way]
        if last is not None:
            wait_for([last])

    def _log(self, text: str) -> None:
        print(f"{self._line.name}: {text}", file=sys.stderr, flush=True)
