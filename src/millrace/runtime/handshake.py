"""Connections whose two ends have proved to each other that they belong to one run.

Both know the run's token, a secret that never travels. Each sends a number of its own (a nonce) and proves that it
knows the token by an HMAC over both numbers, the listener first. Four frames, each of a fixed head (what we are, the
length) and at most 4 KiB of JSON, so that a stranger cannot make us allocate or wait:

    dialer    version, nonce
    listener  version, nonce, proof
    dialer    proof (over what follows, too), hello: whatever it wants to say of itself
    listener  welcome

Nothing is encrypted: who can read the network can read what is sent later. Keep runs to networks that you trust.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import selectors
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from millrace.errors import SettingError, WorkerError
from millrace.version import __version__

_HEAD = struct.Struct("<8sH")
_MAGIC = b"millrace"
_LONGEST_BYTES = 4096
_NONCE_BYTES = 32
_SHORTEST_TOKEN_BYTES = 16
_PENDING = 64  # handshakes at a time; one more drops the oldest
_HANDSHAKE_S = 5.0  # for the other side of one, while we listen
_RETRY_S = 0.005
_UNIX_BUFFER_BYTES = 2**20  # more is slower, as it leaves the cache; TCP finds its own size

_Fields = dict[str, Any]
_Steps = Generator[int, bytes, _Fields]  # yields how many bytes it reads next; returns the other's hello


class _Pending(NamedTuple):
    steps: _Steps
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
        self._proven: deque[tuple[socket.socket, _Fields]] = deque()

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
        _tune(connection)
        steps = _answer(connection.send, token)
        self._pending[connection] = _Pending(steps, bytearray(), next(steps), time.monotonic() + _HANDSHAKE_S)
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> None:
        steps, read, needed, deadline_s = self._pending[connection]
        try:
            content = connection.recv(needed - len(read))
            if not content:
                raise WorkerError("ended in the middle of the handshake")
            read += content
            while len(read) >= needed:
                needed, read = steps.send(bytes(read)), bytearray()
            self._pending[connection] = _Pending(steps, read, needed, deadline_s)
        except StopIteration as end:
            self._forget(connection)
            self._proven.append((connection, end.value))
        except BlockingIOError:
            return
        except (WorkerError, OSError) as error:
            self._refuse(connection, str(error))

    def _refuse(self, connection: socket.socket, why: str) -> None:
        self._forget(connection)
        who = _described(connection)
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
    kind, place = _parts(where)
    try:
        if kind == "tcp":
            listening = socket.create_server(place, backlog=128)
            host, port = listening.getsockname()[:2]
            address = f"tcp:{host}:{port}"
        else:
            address = where
            listening = _listen_at(Path(where.removeprefix("unix:")))
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
        connection = _connect(address, deadline_s)
    except OSError as error:
        raise WorkerError(
            f"nobody answers at {address} ({error.strerror or error}). The run it belongs to may have ended."
        ) from error
    try:
        _tune(connection)
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


def _answer(write: Callable[[bytes], object], token: bytes) -> _Steps:
    """The listener's side."""
    asked = yield from _frame()
    if asked.get("version") != __version__:
        _try(write, {"version": __version__})
        raise WorkerError(_other_version(asked))
    theirs, ours = _text(asked, "nonce"), secrets.token_hex(_NONCE_BYTES)
    write(_framed({"version": __version__, "nonce": ours, "proof": _proof(token, "listener", theirs, ours, "")}))
    proven = yield from _frame()
    hello = _text(proven, "hello") if "proof" in proven else ""
    if not hmac.compare_digest(
        str(proven.get("proof")).encode(), _proof(token, "dialer", theirs, ours, hello).encode()
    ):
        _try(write, {"refused": "token"})
        raise WorkerError("has another token: it belongs to another run")
    write(_framed({"welcome": True}))
    return _object(hello.encode())


def _ask(write: Callable[[bytes], object], token: bytes, fields: Mapping[str, Any]) -> _Steps:
    """The dialer's side."""
    ours, hello = secrets.token_hex(_NONCE_BYTES), json.dumps(dict(fields))
    write(_framed({"version": __version__, "nonce": ours}))
    answer = yield from _frame()
    if answer.get("version") != __version__:
        raise WorkerError(_other_version(answer))
    theirs = _text(answer, "nonce")
    if not hmac.compare_digest(_text(answer, "proof").encode(), _proof(token, "listener", ours, theirs, "").encode()):
        _try(write, {"refused": "token"})
        raise WorkerError("has another token: it belongs to another run")
    write(_framed({"proof": _proof(token, "dialer", ours, theirs, hello), "hello": hello}))
    end = yield from _frame()
    if not end.get("welcome"):
        raise WorkerError("did not take this process for one of its run")
    return {}


def _ask_through(connection: socket.socket, token: bytes, fields: Mapping[str, Any], deadline_s: float) -> None:
    steps = _ask(connection.sendall, token, fields)
    try:
        needed = next(steps)
        while True:
            needed = steps.send(_exactly(connection, needed, deadline_s))
    except StopIteration:
        pass


def _try(write: Callable[[bytes], object], fields: _Fields) -> None:
    with contextlib.suppress(OSError):  # it need not wait for what we say
        write(_framed(fields))


def _frame() -> _Steps:
    head = yield _HEAD.size
    magic, length = _HEAD.unpack(head)
    if magic != _MAGIC:
        raise WorkerError(f"does not speak millrace's language (it began with {head!r})")
    if length > _LONGEST_BYTES:
        raise WorkerError(f"sent {length} bytes where a handshake has at most {_LONGEST_BYTES}")
    return _object((yield length))


def _framed(fields: _Fields) -> bytes:
    content = json.dumps(fields).encode()
    if len(content) > _LONGEST_BYTES:
        raise SettingError(f"a hello of {len(content)} bytes does not fit into {_LONGEST_BYTES}. Send it afterwards.")
    return _HEAD.pack(_MAGIC, len(content)) + content


def _object(content: bytes) -> _Fields:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise WorkerError("sent a damaged handshake")
    return fields


def _text(fields: _Fields, name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise WorkerError(f"sent a handshake without its {name}")
    return value


def _proof(token: bytes, side: str, dialers: str, listeners: str, hello: str) -> str:
    if len(token) < _SHORTEST_TOKEN_BYTES:
        raise SettingError(
            f"a run's token has at least {_SHORTEST_TOKEN_BYTES} bytes; got {len(token)}. See `new_token`."
        )
    # As JSON, so that no part can pass for a piece of another one.
    return hmac.digest(token, json.dumps([side, __version__, dialers, listeners, hello]).encode(), "sha256").hex()


def _other_version(fields: _Fields) -> str:
    return (
        f"is millrace {str(fields.get('version'))[:40]!r} where this is {__version__!r}: install the same version on "
        "all machines of a run"
    )


def _exactly(connection: socket.socket, count: int, deadline_s: float) -> bytes:
    content = b""
    while len(content) < count:
        connection.settimeout(max(deadline_s - time.monotonic(), 1e-6))
        more = connection.recv(count - len(content))
        if not more:
            raise WorkerError("ended the handshake, and does not say why: it is no run of millrace, or has just ended")
        content += more
    return content


def _parts(where: str) -> tuple[str, tuple[str, int]]:
    kind, _, rest = where.partition(":")
    host, _, port = rest.rpartition(":")
    if kind == "unix" and rest:
        return kind, ("", 0)
    if kind == "tcp" and host and port.isdecimal():
        return kind, (host, int(port))
    raise SettingError(f"{where!r} is no address: expected 'unix:/path' or 'tcp:HOST:PORT'.")


def _listen_at(path: Path) -> socket.socket:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.parent.stat().st_mode & 0o077:
        raise SettingError(f"{path.parent} must be for its owner alone (mode 0700) to hold sockets of a run.")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short(path) as short:
            listening.bind(short)
        listening.listen(128)
    except BaseException:
        listening.close()
        raise
    return listening


def _connect(address: str, deadline_s: float) -> socket.socket:
    kind, place = _parts(address)
    left_s = max(deadline_s - time.monotonic(), 1e-6)
    if kind == "tcp":
        return socket.create_connection(place, left_s)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(left_s)
        with _short(Path(address.removeprefix("unix:"))) as short:
            while True:
                try:
                    connection.connect(short)
                    return connection
                except BlockingIOError:  # so many wait already
                    if time.monotonic() > deadline_s:
                        raise
                    time.sleep(_RETRY_S)
    except BaseException:
        connection.close()
        raise


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """Another name of the path, as the system takes only about 100 characters for a socket's."""
    if sys.platform != "linux":
        yield str(path)
        return
    directory = os.open(path.parent, os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def _tune(connection: socket.socket) -> None:
    if connection.family == socket.AF_UNIX:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_BUFFER_BYTES)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _UNIX_BUFFER_BYTES)
    else:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _described(connection: socket.socket) -> str:
    if connection.family == socket.AF_UNIX:
        return "a process of this host"
    try:
        host, port = connection.getpeername()[:2]
    except OSError:
        return "somebody who is gone"
    return f"{host}:{port}"
