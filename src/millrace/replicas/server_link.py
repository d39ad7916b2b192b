"""One end of a connection of a shard: messages, shared regions and bytes in bulk.

On one host (a Unix socket) memory is shared: a region's descriptor follows the message that names it. Between hosts the
same tensors follow as bytes.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from millrace.errors import WorkerError
from millrace.runtime.messages import (
    LONGEST_WAIT_S,
    Message,
    bytes_of,
    readable,
    reading,
    receive_bytes,
    send,
    send_bytes,
)

_LENGTH = struct.Struct("<I")
_NO_MESSAGE = 0x8000_0000  # set in the length of what is not a `Message`


class Link:
    """A connection with one named side. shared: whether the other side is on this host and can be given memory."""

    def __init__(self, connection: socket.socket, who: str) -> None:
        self.connection = connection
        self.who = who
        self.shared = connection.family == socket.AF_UNIX
        if not self.shared:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, kind: str, timeout_s: float, fields: Mapping[str, Any] | None = None, **tensors: Tensor) -> None:
        """Raises: WorkerError when the other side has ended, or takes nothing for so long."""
        send(self.connection, Message(kind, fields or {}, tensors), timeout_s, self.who)

    def receive(self, timeout_s: float = LONGEST_WAIT_S) -> Message:
        """Raises: WorkerError when the other side has ended, or says nothing for so long."""
        found = self.receive_any(timeout_s)
        if isinstance(found, Message):
            return found
        raise WorkerError(f"{self.who} sent bytes where a message was expected.")

    def send_frame(self, content: bytes, timeout_s: float) -> None:
        """Write bytes that are no `Message`; `receive_any` tells them apart. Raises: as `send`."""
        framed = memoryview(_LENGTH.pack(len(content) | _NO_MESSAGE) + content)
        send_bytes(self.connection, framed, timeout_s, self.who)

    def receive_any(self, timeout_s: float = LONGEST_WAIT_S) -> Message | bytearray:
        """A message, or the bytes of `send_frame`. Raises: as `receive`."""
        deadline_s = time.monotonic() + timeout_s
        head = bytearray(_LENGTH.size)
        receive_bytes(self.connection, memoryview(head), timeout_s, self.who)
        (length,) = _LENGTH.unpack(head)
        if length & _NO_MESSAGE:
            content = bytearray(length & ~_NO_MESSAGE)
            receive_bytes(self.connection, memoryview(content), deadline_s - time.monotonic(), self.who)
            return content
        steps = reading()
        next(steps)[:] = head
        try:
            while True:
                receive_bytes(self.connection, next(steps), deadline_s - time.monotonic(), self.who)
        except StopIteration as end:
            message: Message = end.value
            return message

    def readable(self, timeout_s: float) -> bool:
        """Whether something comes within so long; the end of the connection is something."""
        try:
            return bool(readable([self.connection], timeout_s))
        except (OSError, ValueError):  # it was closed here
            return True

    def send_region(self, descriptor: int, timeout_s: float) -> None:
        """Hand over a descriptor. Raises: as `send`."""
        try:
            self.connection.settimeout(timeout_s)
            socket.send_fds(self.connection, [b"!"], [descriptor])
        except OSError as error:
            raise WorkerError(f"{self.who} has ended: it could not be given memory to share ({error}).") from None

    def receive_region(self, timeout_s: float) -> int:
        """Returns: a descriptor, the caller's to close. Raises: as `receive`."""
        try:
            self.connection.settimeout(timeout_s)
            _, descriptors, _, _ = socket.recv_fds(self.connection, 1, 1)
        except OSError as error:
            raise WorkerError(f"{self.who} gave no memory to share within {timeout_s:.3g} s ({error}).") from None
        if not descriptors:
            raise WorkerError(f"{self.who} ended, or gave no memory to share where it was to.")
        return descriptors[0]

    def send_tensors(self, tensors: Iterable[Tensor], timeout_s: float) -> None:
        """Write the bytes of tensors of which the other side knows the shapes. Raises: as `send`."""
        for tensor in tensors:
            if tensor.nbytes:
                send_bytes(self.connection, bytes_of(tensor.contiguous()), timeout_s, self.who)

    def receive_tensors(self, tensors: Iterable[Tensor], timeout_s: float) -> None:
        """Fill tensors with bytes of `send_tensors`. timeout_s: for each, as there. Raises: as `receive`."""
        for tensor in tensors:
            if not tensor.nbytes:
                continue
            target = (
                tensor
                if tensor.is_contiguous() and tensor.device.type == "cpu"
                else torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
            )
            receive_bytes(self.connection, bytes_of(target), timeout_s, self.who)
            if target is not tensor:
                tensor.copy_(target)

    @contextlib.contextmanager
    def in_bulk(self) -> Iterator[None]:
        """Inside, bytes without a head travel: when something fails in their middle, the connection ends."""
        try:
            yield
        except WorkerError:
            self.end()
            raise

    def end_reading(self) -> None:
        """What has arrived can still be read; after it the other side counts as ended."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)

    def end(self) -> None:
        """End the connection from any thread: whoever reads or writes it wakes up, and closes it."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection and give its descriptor back. A second call does nothing."""
        self.end()
        self.connection.close()
