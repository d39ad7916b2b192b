"""What a role has of the driver: messages to and from it, and a count that shows that it gets on."""

from __future__ import annotations

import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from millrace.errors import WorkerError
from millrace.replicas.suspicion import BEAT_S
from millrace.runtime.messages import LONGEST_WAIT_S, Message, receive, send, until_readable

LOOPBACK = "127.0.0.1"
_DRIVER = "the driver"


class Line:
    """The line to the driver. For any thread. When the driver ends it, this process ends.

    name: this member's. directory: the run's, for sockets and files; only its user can enter. token: the run's, for
    connections between members. host: the address by which this machine has reached the driver, and by which the other
    members reach it; None where all members are on the driver's machine.
    """

    def __init__(
        self, name: str, directory: Path, token: bytes, connection: socket.socket, beat: socket.socket
    ) -> None:
        self.name = name
        self.directory = directory
        self.token = token
        self.host: str | None = None if connection.family == socket.AF_UNIX else connection.getsockname()[0]
        self._connection = connection
        self._beat = beat
        self._saying = threading.Lock()
        self._heard: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._abandoned = -1
        self._progress = (0, "", False)
        self._counting = threading.Lock()
        for work in (self._listen, self._keep_beating):
            threading.Thread(target=or_end, args=(work,), name=work.__name__, daemon=True).start()

    def place(self, name: str) -> str:
        """Where a server of this member's may listen: a socket of that name, or any port where hosts are several."""
        return f"unix:{self.directory}/{name}" if self.host is None else f"tcp:{self.host}:0"

    def say(self, message: Message) -> None:
        """Tell the driver."""
        with self._saying:
            send(self._connection, message, LONGEST_WAIT_S, _DRIVER)

    def next(self, timeout_s: float) -> Message | None:
        """The driver's next message; None when there was none for so long."""
        try:
            return self._heard.get(timeout=min(max(timeout_s, 0.0), LONGEST_WAIT_S))
        except queue.Empty:
            return None

    def abandoned(self, generation: int) -> bool:
        """Whether the driver has said "abandon" of this generation or a later one.

        True as soon as that has arrived, whatever messages still wait to be read; `next` gives it in its turn.
        """
        return self._abandoned >= generation

    def progress(self, doing: str = "", *, waits: bool = False) -> None:
        """Count that something was done, and say what is begun now: a few words for whoever reads that it got stuck.

        Args: waits: whether it gets on only with other members.
        """
        with self._counting:
            self._progress = (self._progress[0] + 1, doing, waits)

    def _listen(self) -> None:
        while True:
            until_readable(self._connection)
            message = receive(self._connection, LONGEST_WAIT_S, _DRIVER)
            if message.kind == "abandon":
                self._abandoned = max(self._abandoned, message.fields["generation"])
            self._heard.put(message)

    def _keep_beating(self) -> None:
        while True:
            count, doing, waits = self._progress
            fields = {"progress": count, "doing": doing, "waits": waits}
            send(self._beat, Message("beat", fields), LONGEST_WAIT_S, _DRIVER)
            time.sleep(BEAT_S)


def or_end(work: Callable[[], None]) -> None:
    """Do the work of a thread without which a member is deaf or dumb: with it the process ends."""
    try:
        work()
    except WorkerError:
        os._exit(0)  # the driver has ended; whatever the role computes is for nobody
    except BaseException:  # such as no memory for a message: who is deaf must not seem well
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
