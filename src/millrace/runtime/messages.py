"""Messages between a driver and its workers: a line of JSON and the bytes of some tensors, over a local socket.

Frame: the length of the header (4 bytes, little-endian), the header as JSON, the tensors' bytes one after the other.
The header's "tensors" lists (name, dtype, shape) of each. Nothing is pickled.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import time
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from millrace.errors import WorkerError

_LENGTH = struct.Struct("<I")
_TOGETHER_BYTES = 64 * 1024  # so few are sent in one call
LONGEST_WAIT_S = 2e6  # 23 days: of the system, which counts milliseconds in 31 bits
_OF_NUMPY = frozenset({torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8})


@dataclass(frozen=True)
class Message:
    """What one side tells the other. kind: what it is about. fields: anything JSON can say. tensors: by name."""

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor that is not empty."""
    if tensor.ndim and tensor.dtype in _OF_NUMPY:  # much quicker
        return tensor.detach().numpy().data.cast("B")
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def pieces(message: Message) -> list[memoryview]:
    """The bytes that travel, one piece after the other. Those of tensors are the tensors' own memory: leave it alone
    until they are sent."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in message.tensors.items()}
    described = [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()]
    header = json.dumps({"kind": message.kind, "fields": dict(message.fields), "tensors": described}).encode()
    contents = [bytes_of(t.cpu()) for t in tensors.values() if t.nbytes]
    return [memoryview(_LENGTH.pack(len(header)) + header), *contents]


def reading() -> Generator[memoryview, None, Message]:
    """Read one message: yields memory to be filled from the connection before the next one is asked for."""
    length = bytearray(_LENGTH.size)
    yield memoryview(length)
    header = bytearray(_LENGTH.unpack(length)[0])
    yield memoryview(header)
    described = json.loads(bytes(header))
    tensors = {}
    for name, dtype, shape in described["tensors"]:
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        if tensor.nbytes:
            yield bytes_of(tensor)
        tensors[name] = tensor
    return Message(described["kind"], described["fields"], tensors)


def readable(connections: Iterable[socket.socket], within_s: float) -> list[socket.socket]:
    """Those that have something to read within so long; the end of a connection is something.

    Raises: ValueError for one that was closed here.
    """
    by_number = {connection.fileno(): connection for connection in connections}
    polled = select.poll()  # `select.select` takes no file whose number is above 1,023
    for number in by_number:
        polled.register(number, select.POLLIN)
    return [by_number[number] for number, _ in polled.poll(1e3 * within_s)]


def until_readable(connection: socket.socket) -> None:
    """Wait for something to read, however long nothing is said; the end of the connection is something.

    Raises: ValueError when it was closed here.
    """
    while not readable([connection], LONGEST_WAIT_S):
        pass


def send(connection: socket.socket, message: Message, timeout_s: float, who: str) -> None:
    """Write one message.

    Args: who: names the other side in errors.

    Raises: WorkerError when it has ended, or takes nothing for so long.
    """
    try:
        connection.settimeout(min(timeout_s, LONGEST_WAIT_S))
        parts = pieces(message)
        if sum(map(len, parts)) <= _TOGETHER_BYTES:
            parts = [memoryview(b"".join(parts))]
        for part in parts:
            connection.sendall(part)
    except TimeoutError:
        raise WorkerError(silent(who, timeout_s)) from None
    except OSError:
        raise WorkerError(_gone(who)) from None


def receive(connection: socket.socket, timeout_s: float, who: str) -> Message:
    """Read one message.

    Args: who: names the other side in errors.

    Raises: WorkerError when it has ended, or the message is not whole in time.
    """
    deadline_s = time.monotonic() + timeout_s
    steps = reading()
    try:
        while True:
            _fill(connection, next(steps), deadline_s, timeout_s, who)
    except StopIteration as end:
        message: Message = end.value
        return message


def send_bytes(connection: socket.socket, content: memoryview, timeout_s: float, who: str) -> None:
    """Write bytes whose number the other side knows, from where they lie. Raises: as `send`."""
    try:
        connection.settimeout(min(timeout_s, LONGEST_WAIT_S))
        connection.sendall(content)
    except TimeoutError:
        raise WorkerError(silent(who, timeout_s)) from None
    except OSError:
        raise WorkerError(_gone(who)) from None


def receive_bytes(connection: socket.socket, content: memoryview, timeout_s: float, who: str) -> None:
    """Fill memory with what the other side sends. Raises: as `receive`."""
    _fill(connection, content, time.monotonic() + timeout_s, timeout_s, who)


def _fill(connection: socket.socket, content: memoryview, deadline_s: float, timeout_s: float, who: str) -> None:
    while len(content):
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise WorkerError(silent(who, timeout_s))
        try:
            connection.settimeout(min(left_s, LONGEST_WAIT_S))
            count = connection.recv_into(content)
        except TimeoutError:
            continue
        except OSError:
            count = 0
        if not count:
            raise WorkerError(_gone(who))
        content = content[count:]


def silent(who: str, timeout_s: float) -> str:
    """What to say of a side that lets one wait."""
    return (
        f"{who} did not answer within {timeout_s:.3g} s. It may be slow, stuck or stopped. Allow more time by "
        "`timeout_s`, or make the session anew and restore the last checkpoint."
    )


def _gone(who: str) -> str:
    return (
        f"{who} has ended: it was killed, ran out of memory or crashed. What it held of the variables is gone; "
        "make the session anew and restore the last checkpoint."
    )
