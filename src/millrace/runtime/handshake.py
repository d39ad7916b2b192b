"""Connections whose two ends have proved to each other that they belong to one run; what they say is in `proof`."""

from __future__ import annotations

import secrets
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from millrace.errors import SettingError, WorkerError
from millrace.runtime.addresses import connected_to, described, listening_at, tune
from millrace.runtime.proof import Fields, Steps, answer, ask

_PENDING = 64  # handshakes at a time; one more drops the oldest
_HANDSHAKE_S = 5.0  # for the other side of one, while we listen


class _Pending(NamedTuple):
    steps: Steps
    read: bytearray
    needed: int
    deadline_s: float


class Listener:
    """Where others dial in. address: what they dial. For one thread at a time.

    on_refused: is told of everybody who was turned away, and why.
    """

    def __init__(self, listening: socket.socket, address: str, on_refused: Callable[[str], None]) -> None:
        self.address = address
        self._listening = listening
        self._on_refused = on_refused
        self._selector = selectors.DefaultSelector()
        self._selector.register(listening, selectors.EVENT_READ)
        self._pending: dict[socket.socket, _Pending] = {}
        self._proven: deque[tuple[socket.socket, Fields]] = deque()

    def fileno(self) -> int:
        """A descriptor that is readable when `ready` has something to do."""
        return self._selector.fileno()

    def accept(self, token: bytes, timeout_s: float) -> tuple[socket.socket, Mapping[str, Any]]:
        """Wait for somebody who knows the token; strangers meanwhile are refused, and do not disturb.

        Returns: the connection, and what the other says of itself.

        Raises: WorkerError when nobody came in time.
        """
        deadline_s = time.monotonic() + timeout_s
        while not self._proven:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise WorkerError(
                    f"nobody who belongs to this run dialed {self.address} within {timeout_s:.3g} s. See whether those "
                    "who should have were started, and whether they were given this address and this run's token."
                )
            self._selector.select(min(left_s, _HANDSHAKE_S))
            self._advance(token)
        return self._proven.popleft()

    def ready(self, token: bytes) -> list[tuple[socket.socket, Mapping[str, Any]]]:
        """Those who have proved to belong here since the last call. Waits for nobody; call it now and then."""
        self._advance(token)
        found: list[tuple[socket.socket, Mapping[str, Any]]] = list(self._proven)
        self._proven.clear()
        return found

    def close(self) -> None:
        """Listen no more, and drop whoever is not through. A second call does nothing."""
        for connection in [*self._pending, *(c for c, _ in self._proven), self._listening]:
            connection.close()
        self._pending.clear()
        self._proven.clear()
        self._selector.close()
        if self.address.startswith("unix:"):
            Path(self.address.removeprefix("unix:")).unlink(missing_ok=True)

    def _advance(self, token: bytes) -> None:
        for key, _ in self._selector.select(0):
            if key.fileobj is self._listening:
                self._begin(token)
            else:
                assert isinstance(key.fileobj, socket.socket)
                self._read(key.fileobj)
        now_s = time.monotonic()
        for connection in [c for c, pending in self._pending.items() if now_s > pending.deadline_s]:
            self._refuse(connection, "said nothing, or not enough, for too long")

    def _begin(self, token: bytes) -> None:
        try:
            connection, _ = self._listening.accept()
        except OSError:  # it has gone again
            return
        if len(self._pending) >= _PENDING:
            self._refuse(next(iter(self._pending)), "had said nothing yet when too many others came")
        connection.setblocking(False)
        tune(connection)
        steps = answer(connection.send, token)
        self._pending[connection] = _Pending(steps, bytearray(), next(steps), time.monotonic() + _HANDSHAKE_S)
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> None:
        if connection not in self._pending:  # it had to go for one who came in the same moment
            return
        steps, read, needed, deadline_s = self._pending[connection]
        try:
            try:
                content = connection.recv(needed - len(read))
            except BlockingIOError:
                return
            if not content:
                raise WorkerError("ended in the middle of the handshake")
            read += content
            while len(read) >= needed:
                needed, read = steps.send(bytes(read)), bytearray()
            self._pending[connection] = _Pending(steps, read, needed, deadline_s)
        except StopIteration as end:
            self._forget(connection)
            self._proven.append((connection, end.value))
        except (WorkerError, OSError) as error:
            self._refuse(connection, str(error))
        except SettingError:  # ours, not the other's
            raise
        except Exception as error:  # whatever a stranger says ends no more than its own connection
            self._refuse(connection, f"sent what cannot be read ({type(error).__name__}: {error})")

    def _refuse(self, connection: socket.socket, why: str) -> None:
        self._forget(connection)
        who = described(connection)
        connection.close()
        self._on_refused(f"{who} dialed {self.address} and was refused: it {why}.")

    def _forget(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._pending[connection]


def listen(where: str, on_refused: Callable[[str], None] = lambda _: None) -> Listener:
    """Open a place where others of this run can dial in.

    Args:
        where: "unix:/path", in a directory that only this user can enter (made if missing), or "tcp:127.0.0.1:0" for
            any free port of this address.
        on_refused: see `Listener`.

    Raises: SettingError when it is no such place; WorkerError when one cannot listen there.
    """
    try:
        listening, address = listening_at(where)
    except OSError as error:
        raise WorkerError(f"cannot listen at {where}: {error.strerror or error}. Choose another place.") from error
    listening.setblocking(False)
    return Listener(listening, address, on_refused)


def dial(address: str, token: bytes, hello: Mapping[str, Any], timeout_s: float) -> socket.socket:
    """Connect with a `Listener` of this run.

    Args:
        address: the listener's.
        token: the run's secret.
        hello: what to say of oneself, in JSON; short.
        timeout_s: for all of it.

    Raises: WorkerError when nobody listens, or whoever does is not of this run, of another version, or silent.
    """
    deadline_s = time.monotonic() + timeout_s
    try:
        connection = connected_to(address, deadline_s)
    except OSError as error:
        raise WorkerError(
            f"nobody answers at {address} ({error.strerror or error}). The run it belongs to may have ended."
        ) from error
    try:
        tune(connection)
        _ask_through(connection, token, hello, deadline_s)
    except TimeoutError:
        connection.close()
        raise WorkerError(
            f"whoever listens at {address} said too little within {timeout_s:.3g} s: it is no run of millrace, or its "
            "driver is stopped."
        ) from None
    except OSError as error:
        connection.close()
        raise WorkerError(
            f"whoever listens at {address} broke off the handshake ({error.strerror or error})."
        ) from None
    except WorkerError as error:
        connection.close()
        raise WorkerError(f"whoever listens at {address} {error}.") from None
    except BaseException:
        connection.close()
        raise
    connection.settimeout(None)
    return connection


def new_token() -> bytes:
    """A secret for a run."""
    return secrets.token_bytes(32)


def _ask_through(connection: socket.socket, token: bytes, fields: Mapping[str, Any], deadline_s: float) -> None:
    steps = ask(connection.sendall, token, fields)
    try:
        needed = next(steps)
        while True:
            needed = steps.send(_exactly(connection, needed, deadline_s))
    except StopIteration:
        pass


def _exactly(connection: socket.socket, count: int, deadline_s: float) -> bytes:
    content = b""
    while len(content) < count:
        connection.settimeout(max(deadline_s - time.monotonic(), 1e-6))
        more = connection.recv(count - len(content))
        if not more:
            raise WorkerError("ended the handshake, and does not say why: it is no run of millrace, or has just ended")
        content += more
    return content
