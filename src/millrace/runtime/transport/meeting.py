"""How the workers of one host find each other: through sockets in a directory that only their user can enter.

Every device has a number, its place in the sorted list of devices. A worker listens at DIRECTORY/NUMBER, calls those
with lower numbers with which it has edges, and answers those with higher ones. Each side says who it is and what it
takes the edges to be, and hands over a descriptor of the region that it writes. Then the name is removed: nobody else
may call.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from millrace.errors import SettingError, WorkerError
from millrace.partition.program import Edge

_RETRY_S = 0.005
_HELLO_BYTES = 4096


@dataclass(frozen=True)
class Peer:
    """A worker on the other end. region: a descriptor of the memory that it writes."""

    device: str
    connection: socket.socket
    region: int


def meet(device: str, edges: Sequence[Edge], region: int, directory: Path, timeout_s: float) -> list[Peer]:
    """Connect with every worker that has an edge in common with this device.

    Args:
        device: this one.
        edges: all of the partition, the same for everybody.
        region: a descriptor of the memory that this worker writes; it stays the caller's.
        directory: empty, of mode 0700, on a file system that can hold sockets.
        timeout_s: seconds for all of them to come.

    Raises:
        SettingError: others can enter the directory.
        WorkerError: somebody did not come, or was given other edges; the directory was used before.
    """
    if directory.stat().st_mode & 0o077:
        raise SettingError(f"{directory} must be for its owner alone (mode 0700), because its sockets hand out memory.")
    numbers = {name: at for at, name in enumerate(sorted({e.source for e in edges} | {e.target for e in edges}))}
    names = sorted({e.source for e in edges if e.target == device} | {e.target for e in edges if e.source == device})
    deadline_s = time.monotonic() + timeout_s
    hello = f"{_digest(edges)} {device}".encode()
    found: dict[str, Peer] = {}
    with contextlib.ExitStack() as on_error, _short(directory) as short:
        if not names:
            return []
        own_path = f"{short}/{numbers[device]}"
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.closing(listening):
            _bind(listening, own_path, device, directory)
            try:
                listening.listen(len(numbers))
                called = []
                for name in names:
                    if numbers[name] < numbers[device]:
                        call = on_error.enter_context(_call(f"{short}/{numbers[name]}", device, name, deadline_s))
                        socket.send_fds(call, [hello], [region])
                        called.append((name, call))
                while len(found) + len(called) < len(names):
                    missing = [name for name in names if name not in found and name not in dict(called)]
                    answer = on_error.enter_context(_answer(listening, device, missing, deadline_s))
                    peer = _hear(answer, device, missing, hello, deadline_s)
                    on_error.callback(os.close, peer.region)
                    found[peer.device] = peer
                    socket.send_fds(answer, [hello], [region])
                for name, call in called:
                    found[name] = _hear(call, device, [name], hello, deadline_s)
                    on_error.callback(os.close, found[name].region)
            finally:
                os.unlink(own_path)
        on_error.pop_all()
    return list(found.values())


@contextlib.contextmanager
def _short(directory: Path) -> Iterator[str]:
    """Another path of the directory: one of a socket has at most 107 bytes."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _bind(listening: socket.socket, path: str, device: str, directory: Path) -> None:
    try:
        listening.bind(path)
    except OSError as error:
        raise WorkerError(
            f"{device} cannot listen in {directory}: {error.strerror}. Give every run a new directory, on a file "
            "system that can hold sockets, and every device one worker."
        ) from error


def _call(path: str, device: str, peer: str, deadline_s: float) -> socket.socket:
    while True:
        call = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            call.connect(path)
            return call
        except (FileNotFoundError, ConnectionRefusedError) as error:
            call.close()
            if time.monotonic() > deadline_s:
                raise _absent(device, [peer]) from error
            time.sleep(_RETRY_S)


def _answer(listening: socket.socket, device: str, missing: Sequence[str], deadline_s: float) -> socket.socket:
    try:
        listening.settimeout(max(deadline_s - time.monotonic(), _RETRY_S))
        return listening.accept()[0]
    except TimeoutError as error:
        raise _absent(device, missing) from error


def _hear(connection: socket.socket, device: str, expected: Sequence[str], hello: bytes, deadline_s: float) -> Peer:
    """Read a peer's hello, and compare what it takes the edges to be with our own idea."""
    try:
        connection.settimeout(max(deadline_s - time.monotonic(), _RETRY_S))
        said, descriptors, _, _ = socket.recv_fds(connection, _HELLO_BYTES, 1)
    except (TimeoutError, ConnectionError) as error:
        raise _absent(device, expected) from error
    if not descriptors:
        raise _absent(device, expected)
    digest, _, name = said.decode().partition(" ")
    if digest != hello.decode().partition(" ")[0] or name not in expected:
        os.close(descriptors[0])
        raise WorkerError(
            f"{device} was called by {name!r}, which knows other edges, where {' or '.join(expected)} was expected. "
            "Give every worker the edges of the same partition, and every run a directory of its own."
        )
    connection.setblocking(False)
    return Peer(name, connection, descriptors[0])


def _absent(device: str, missing: Iterable[str]) -> WorkerError:
    return WorkerError(
        f"{device} found no connection with {', '.join(missing)} in the time it had for it. "
        "See whether these workers have started, and whether they were given the same directory."
    )


def _digest(edges: Iterable[Edge]) -> str:
    return hashlib.sha256(
        repr([(e.number, e.source, e.target, str(e.spec), e.codec) for e in edges]).encode()
    ).hexdigest()
