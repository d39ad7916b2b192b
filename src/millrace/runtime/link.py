"""A connection that never waits: what cannot be sent yet stays in a queue, what is not whole yet is not given out."""

from __future__ import annotations

import itertools
import socket
import threading
from collections import deque

from millrace.runtime.messages import Message, pieces, reading

_PIECES_AT_ONCE = 64  # the system takes at most 1024
_READS_AT_ONCE = 64  # so that one who sends much does not keep others waiting


class Link:
    """Messages over a connection. `send` and `flush` for any thread, `read` for one.

    Attributes: moved_bytes: that have been sent and received.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.moved_bytes = 0
        self._unsent: deque[memoryview] = deque()
        self._sending = threading.Lock()
        self._steps = reading()
        self._wanted = next(self._steps)

    def send(self, message: Message) -> bool:
        """Send as much as the other side takes now, and keep the rest; its tensors must not change before it is sent.

        Returns: whether all has gone. If not, call `flush` when the connection can be written to.
        """
        content = pieces(message)
        with self._sending:
            self._unsent += content
        return self.flush()

    def flush(self) -> bool:
        """Send more of what is left. Returns: whether all has gone, or nothing can go any more."""
        with self._sending:
            try:
                while self._unsent:
                    self._sent(self.connection.sendmsg(list(itertools.islice(self._unsent, _PIECES_AT_ONCE))))
            except BlockingIOError:
                return False
            except OSError:  # it has ended; whoever reads learns of it
                self._unsent.clear()
            return True

    def read(self) -> tuple[list[Message], bool]:
        """The messages that are whole by now, and whether there may be more to come (the other side has not ended)."""
        found: list[Message] = []
        for _ in range(_READS_AT_ONCE):
            try:
                count = self.connection.recv_into(self._wanted)
            except BlockingIOError:
                break
            except OSError:
                count = 0
            if not count:
                return found, False
            self.moved_bytes += count
            self._wanted = self._wanted[count:]
            while not len(self._wanted):
                try:
                    self._wanted = next(self._steps)
                except StopIteration as end:
                    found.append(end.value)
                    self._steps = reading()
                    self._wanted = next(self._steps)
        return found, True

    def close(self) -> None:
        """End the connection, and forget what is not sent. A second call does nothing."""
        with self._sending:
            self._unsent.clear()
            self.connection.close()

    def _sent(self, count: int) -> None:
        self.moved_bytes += count
        while count:
            if count < len(self._unsent[0]):
                self._unsent[0] = self._unsent[0][count:]
                return
            count -= len(self._unsent.popleft())
