"""Sockets between processes that trust each other: a Unix socket in a private directory, or TCP on the loopback.

An address is "unix:/path" or "tcp:host:port". What a shard and its clients need of a listener is `Listener`; whoever
must keep strangers out gives them one whose `accept` does.
"""

from __future__ import annotations

import os
import socket
from typing import Protocol

from millrace.errors import SettingError, WorkerError

_LONGEST_PATH_BYTES = 107


class Listener(Protocol):
    """Where others dial in."""

    def accept(self) -> socket.socket:
        """The next connection, as soon as the other side has proved whatever it must. Raises: OSError once closed."""
        ...

    def close(self) -> None:
        """Take no more; an `accept` that waits ends."""
        ...


class PlainListener:
    """Listens at an address; "tcp:127.0.0.1:0" takes a free port, which `address` then names."""

    def __init__(self, address: str) -> None:
        kind, where = _parse(address)
        self._path = ""
        if kind == "unix":
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.bind(where)
            self._path = where
            self.address = address
        else:
            host, _, port = where.rpartition(":")
            self._socket = socket.create_server((host, int(port)))
            self.address = f"tcp:{host}:{self._socket.getsockname()[1]}"
        self._socket.listen()

    def accept(self) -> socket.socket:
        """See `Listener`."""
        return self._socket.accept()[0]

    def close(self) -> None:
        """See `Listener`."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # closed before
        self._socket.close()
        if self._path:
            os.unlink(self._path)


def dial(address: str, timeout_s: float = 10.0) -> socket.socket:
    """Connect. Raises: WorkerError naming the address when nobody listens there."""
    kind, where = _parse(address)
    try:
        if kind == "tcp":
            host, _, port = where.rpartition(":")
            return socket.create_connection((host, int(port)), timeout_s)
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout_s)
        connection.connect(where)
        return connection
    except OSError as error:
        raise WorkerError(f"nobody answers at {address}: {error}. The process that listened there has ended.") from None


def _parse(address: str) -> tuple[str, str]:
    kind, _, where = address.partition(":")
    if kind not in ("unix", "tcp") or not where:
        raise SettingError(f"address {address!r}: expected 'unix:/path' or 'tcp:host:port'.")
    if kind == "unix" and len(where.encode()) > _LONGEST_PATH_BYTES:
        raise SettingError(f"address {address!r}: a socket's path has at most {_LONGEST_PATH_BYTES} bytes.")
    return kind, where
