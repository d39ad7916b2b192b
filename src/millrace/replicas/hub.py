"""The driver's side of its members: starts them, hears them, and knows within moments which of them are lost.

One background thread owns the connections and the launcher; the driver talks to it through queues. Nothing waits for a
member without bound: one who does not start, beat, or get on with what is expected is killed first and reported then.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from millrace.errors import WorkerError
from millrace.replicas.member import environment
from millrace.replicas.suspicion import BEAT_LATE_S, BEAT_S, Watched
from millrace.runtime.handshake import listen
from millrace.runtime.launch import Launcher
from millrace.runtime.link import Link
from millrace.runtime.messages import LONGEST_WAIT_S, Message

START_WITHIN_S = 120.0
EXIT_WITHIN_S = 0.5
_LOOK_S = 0.5
_SOON_S = 0.005
_AGAIN_S = 1.0  # before one that could not be started is reported, and another one tried


@dataclass(frozen=True)
class Joined:
    """A member has said hello, and is a spare. pid, host: its process, and the name of the machine that it is on. gpus:
    of a run on GPUs, those that it may use, by names that all on its machine give them. nccl: whether it has NCCL."""

    member: str
    pid: int
    host: str
    gpus: tuple[str, ...] = ()
    nccl: bool = False


@dataclass(frozen=True)
class Said:
    """A member's message."""

    member: str
    message: Message


@dataclass(frozen=True)
class Lost:
    """A member is gone, for certain (killed, where it had not ended). Nothing more is heard of it."""

    member: str
    why: str


Event = Joined | Said | Lost


class _Member:
    """What the hub knows of one. failed: why it could not be started. ending: why it is being ended, and since when."""

    def __init__(self, name: str, now_s: float) -> None:
        self.name = name
        self.started_s = now_s
        self.hello: Mapping[str, Any] = {}
        self.line: Link | None = None
        self.beat: Link | None = None
        self.joined = False
        self.lost = False
        self.failed = ""
        self.watched = Watched(now_s)
        self.ending: tuple[str, float] | None = None


class Hub:
    """All members of a run.

    Args:
        launcher: starts and kills their processes; the hub closes it.
        token: the run's secret.
        directory: for sockets; only its user can enter (mode 0700). Members get to know it.
        say: is told, from the hub's thread, of strangers that were refused.
        beat_late_s: how long a member may show no sign of life.
        start_within_s: how long a member may take to start.
        exit_within_s: how long a killed one may take to end, before it is reported lost without how it ended: its
            machine may be cut off.
    """

    def __init__(
        self,
        launcher: Launcher,
        token: bytes,
        directory: Path,
        say: Callable[[str], None],
        *,
        beat_late_s: float = BEAT_LATE_S,
        start_within_s: float = START_WITHIN_S,
        exit_within_s: float = EXIT_WITHIN_S,
    ) -> None:
        self._launcher = launcher
        self._token = token
        self._directory = directory
        self._say = say
        self._beat_late_s = beat_late_s
        self._start_within_s = start_within_s
        self._exit_within_s = exit_within_s
        self._listener = listen(launcher.where or f"unix:{directory}/hub", say)
        self._members: dict[str, _Member] = {}  # all there ever were
        self._numbers = itertools.count()
        self._events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        self._commands: deque[Callable[[], None]] = deque()
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ, self._on_woken)
        self._selector.register(self._listener, selectors.EVENT_READ, self._greet)
        self._turned_s = time.monotonic()
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="millrace-hub", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """Where members dial in."""
        return self._listener.address

    @property
    def members(self) -> tuple[str, ...]:
        """Those who have joined and are not known to be lost."""
        return tuple(m.name for m in list(self._members.values()) if m.joined and m.ending is None and not m.lost)

    def start(self, count: int) -> list[str]:
        """Start so many members; each joins when it is ready, or is lost.

        Returns: their names, "m0", "m1" and so on.

        Raises: PlacementError when there is no room for them.
        """
        names = [f"m{next(self._numbers)}" for _ in range(count)]
        done: Future[None] = Future()

        def start() -> None:
            try:
                for name in names:
                    self._start(name)
                done.set_result(None)
            except Exception as error:
                done.set_exception(error)

        self._tell(start)
        while not wait([done], _LOOK_S).done:
            if not self._thread.is_alive():
                raise WorkerError("members cannot be started: the hub was closed, or its thread failed.")
        done.result()
        return names

    def send(self, member: str, message: Message) -> None:
        """Send a message, and wait for nothing. To one who is lost it goes nowhere.

        The message's tensors must not change before the member can have them all.

        Raises: WorkerError when the member has not joined yet.
        """
        known = self._members[member]
        if not known.joined:
            raise WorkerError(f"{member} has not joined yet: wait for its Joined before telling it {message.kind!r}.")
        line = known.line
        if line is not None and known.ending is None and not line.send(message):
            self._tell(lambda: self._heed(known, selectors.EVENT_READ | selectors.EVENT_WRITE))

    def expect(self, member: str, within_s: float | None) -> None:
        """From now on the member must say something or count progress within so long, again and again; None ends it."""
        now_s = time.monotonic()
        known = self._members[member]

        def expect() -> None:
            known.watched = known.watched.expected(now_s, within_s)

        self._tell(expect)

    def kill(self, member: str, why: str) -> None:
        """End a member; its Lost says why. One who is being ended already is left at that."""
        self._tell(lambda: self._end(self._members[member], why))

    def clear(self, why: str) -> None:
        """End all members, and forget whatever they said. None is left when this returns; new ones can be started."""
        for member in list(self._members):
            self.kill(member, why)
        while not all(member.lost for member in self._members.values()):
            self.next(_LOOK_S)
        while self.next(0.0) is not None:
            pass

    def next(self, timeout_s: float) -> Event | None:
        """The next event; None when there was none for so long."""
        try:
            event = self._events.get(timeout=min(max(timeout_s, 0.0), LONGEST_WAIT_S))
        except queue.Empty:
            return None
        if isinstance(event, BaseException):
            self._events.put(event)  # it stays so
            raise WorkerError(f"the thread that hears the members failed ({type(event).__name__}: {event})") from event
        return event

    def close(self) -> None:
        """End all members. No process, thread or socket is left. A second call does nothing."""
        if not self._closing:
            self._closing = True
            self._tell(lambda: None)
            self._thread.join()
            self._wake.close()

    def _tell(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        with contextlib.suppress(BlockingIOError, OSError):  # full: it will wake anyway
            self._wake.send(b"!")

    # All below runs in the thread.

    def _start(self, name: str) -> None:
        member = _Member(name, time.monotonic())
        try:
            self._launcher.start(name, environment(self.address, self._token, self._directory))
        except OSError as error:  # the machine is short of something, and may not be for long
            member.failed = f"it could not be started: {error}"
        self._members[name] = member

    def _serve(self) -> None:
        try:
            while not self._closing:
                self._turn()
        except BaseException as error:
            self._events.put(error)
        finally:
            self._launcher.close()
            for member in self._members.values():
                self._hang_up(member)
            self._listener.close()
            self._selector.close()
            self._woken.close()

    def _turn(self) -> None:
        ending = any(m.ending for m in self._members.values())
        for key, _ in self._selector.select(_SOON_S if ending else BEAT_S):
            key.data()
        while self._commands:
            self._commands.popleft()()
        self._greet()
        now_s = time.monotonic()
        if now_s - self._turned_s > self._beat_late_s:  # this process was stopped: nobody was heard, all may be well
            for member in self._members.values():
                member.watched = member.watched.excused(now_s)
        self._turned_s = now_s
        for member in list(self._members.values()):
            self._look_after(member, now_s)

    def _on_woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096)

    def _greet(self) -> None:
        for connection, hello in self._listener.ready(self._token):
            member = self._members.get(str(hello.get("name")))
            known = member is not None and not member.lost and member.ending is None
            if member is None or not known:
                self._say(f"{hello.get('name')!r} dialed {self.address}, but no such member is expected: refused.")
                connection.close()
            elif hello.get("for") == "beat" and member.beat is None:
                member.beat = self._linked(connection, partial(self._on_beat, member))
            elif hello.get("for") == "line" and member.line is None:
                member.hello = hello
                member.line = self._linked(connection, partial(self._on_line, member))
            else:
                self._say(f"{member.name} dialed {self.address} once too often: refused.")
                connection.close()
            if member is not None and known and not member.joined and member.line and member.beat:
                member.joined = True
                member.watched = Watched(time.monotonic())
                hello = member.hello
                gpus = tuple(str(gpu) for gpu in hello.get("gpus", ()))
                nccl = bool(hello.get("nccl", False))
                self._events.put(Joined(member.name, int(hello["pid"]), str(hello["host"]), gpus, nccl))

    def _linked(self, connection: socket.socket, on_ready: Callable[[], None]) -> Link:
        self._selector.register(connection, selectors.EVENT_READ, on_ready)
        return Link(connection)

    def _heed(self, member: _Member, events: int) -> None:
        if member.line is not None:
            self._selector.modify(member.line.connection, events, partial(self._on_line, member))

    def _on_line(self, member: _Member) -> None:
        if member.line is None:
            return
        before_bytes = member.line.moved_bytes
        if member.line.flush():
            self._heed(member, selectors.EVENT_READ)
        messages, more = member.line.read()
        for message in messages:
            self._events.put(Said(member.name, message))
        if member.line.moved_bytes != before_bytes:  # also in the middle of a long message
            member.watched = member.watched.said(time.monotonic())
        if not more:
            self._drop(member.line)
            member.line = None
            self._end(member, "")

    def _on_beat(self, member: _Member) -> None:
        if member.beat is None:
            return
        messages, more = member.beat.read()
        for message in messages:
            said = message.fields
            member.watched = member.watched.beaten(time.monotonic(), said["progress"], said["doing"], said["waits"])
        if not more:  # the line will end as well, or its silence shows
            self._drop(member.beat)
            member.beat = None

    def _look_after(self, member: _Member, now_s: float) -> None:
        if member.lost:
            return
        if member.failed:
            if now_s - member.started_s > _AGAIN_S:  # whoever starts another in its place is not to do so at once
                self._events.put(Lost(member.name, member.failed))
                member.lost = True
        elif member.ending is not None:
            self._bury(member, now_s)
        elif member.joined:
            suspicion = member.watched.suspicion(now_s, self._beat_late_s)
            if suspicion is not None:
                self._end(member, suspicion)
        elif self._launcher.exit_of(member.name) is not None:
            self._end(member, "")
        elif now_s - member.started_s > self._start_within_s:
            self._end(member, f"it did not start within {self._start_within_s:.3g} s")

    def _end(self, member: _Member, why: str) -> None:
        """Kill it, and tell it no more; what it has said is still heard. why: "" for whatever its end will show."""
        if member.ending is None and not member.lost and not member.failed:
            self._launcher.kill(member.name)
            if member.line is not None:
                with contextlib.suppress(OSError):  # it ends by itself, too, should the kill be long in coming
                    member.line.connection.shutdown(socket.SHUT_WR)
            member.ending = (why, time.monotonic())

    def _bury(self, member: _Member, now_s: float) -> None:
        """Report it lost once it has ended."""
        assert member.ending is not None
        why, since_s = member.ending
        how = self._launcher.exit_of(member.name)
        if how is None and now_s - since_s < self._exit_within_s:
            return
        if not why:
            why = f"its process {how}" if how else "its connection ended, and how its process did is not known"
            why = why if member.joined else f"before it was ready, {why}"
            words = self._launcher.last_words(member.name)
            why += f"; its last words: {words}" if words else ""
        while how is not None and member.line is not None:  # nothing is added any more
            before_bytes = member.line.moved_bytes
            self._on_line(member)
            if member.line is not None and member.line.moved_bytes == before_bytes:
                break
        self._hang_up(member)
        self._events.put(Lost(member.name, why))
        member.lost, member.ending = True, None

    def _hang_up(self, member: _Member) -> None:
        for link in (member.line, member.beat):
            if link is not None:
                self._drop(link)
        member.line = member.beat = None

    def _drop(self, link: Link) -> None:
        self._selector.unregister(link.connection)
        link.close()
