"""Addresses of a run's processes, "unix:/path" or "tcp:HOST:PORT", and plain sockets that listen and dial there."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from millrace.errors import SettingError

_RETRY_S = 0.005
_BACKLOG = 128
_UNIX_BUFFER_BYTES = 2**20  # more is slower, as it leaves the cache; TCP finds its own size


def listening_at(where: str) -> tuple[socket.socket, str]:
    """A socket that listens, and what others dial to reach it: the port that was chosen for "tcp:HOST:0".

    Raises: SettingError when it is no address, or a path in a directory that others can enter; OSError when one cannot
    listen there.
    """
    kind, place = _parts(where)
    if kind == "unix":
        return _listen_at(Path(where.removeprefix("unix:"))), where
    listening = socket.create_server(place, backlog=_BACKLOG)
    host, port = listening.getsockname()[:2]
    return listening, f"tcp:{host}:{port}"


def connected_to(address: str, deadline_s: float) -> socket.socket:
    """A connection with who listens there, by a time of `time.monotonic`.

    Raises: SettingError when it is no address; OSError when nobody listens, or not in time.
    """
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


def tune(connection: socket.socket) -> None:
    """Set the options of a connection over which messages go."""
    if connection.family == socket.AF_UNIX:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_BUFFER_BYTES)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _UNIX_BUFFER_BYTES)
    else:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # whose machine has vanished ends one day


def described(connection: socket.socket) -> str:
    """Who is at the other end, for a message."""
    if connection.family == socket.AF_UNIX:
        return "a process of this host"
    try:
        host, port = connection.getpeername()[:2]
    except OSError:
        return "somebody who is gone"
    return f"{host}:{port}"


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
        listening.listen(_BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening


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
