"""Where the members of a group find each other: a key-value store in the driver, which outlives all workers.

Not `torch.distributed.TCPStore`: that asks for the name of whoever connects, to log it, and a name server that does not
answer, being beyond a link that was cut, say, then holds up every group for seconds; and it lets anybody in.
"""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch.distributed import Store  # type: ignore[attr-defined]

from millrace.errors import WorkerError
from millrace.runtime.handshake import dial, listen, new_token
from millrace.runtime.link import Link
from millrace.runtime.messages import Message, receive, send

GRACE_S = 1.0  # what blocks in torch ends that long after whoever waits for it has said so in words of ours
_LOOK_S = 1.0  # for who is taking too long to prove that it belongs here
_DRIVER = "the driver"


@dataclass(frozen=True)
class StoreAddress:
    """Where a store listens. secret: what its members prove to know, in hexadecimal."""

    host: str
    port: int
    secret: str

    def connect(self, generation: int, timeout_s: float) -> Store:
        """The store as the members of one generation see it. It blocks: call it through `Patience.call`.

        Keep the result as long as torch may use it.

        Args: timeout_s: for the connection, and later for every wait for a key; `GRACE_S` is added.
        Raises: RuntimeError when there is no store or it does not answer in time; the result does so too.
        """
        limit_s = timeout_s + GRACE_S
        try:
            connection = dial(f"tcp:{self.host}:{self.port}", bytes.fromhex(self.secret), {}, limit_s)
        except WorkerError as error:
            raise RuntimeError(str(error)) from error
        return _Connected(connection, f"g{generation}", limit_s)


class _Connected(Store):
    """A member's end, with what torch asks of a store. For one thread."""

    def __init__(self, connection: socket.socket, prefix: str, limit_s: float) -> None:
        super().__init__()
        self._connection, self._prefix, self._limit_s = connection, prefix, limit_s

    def set(self, key: str, value: str | bytes) -> None:
        content = value.encode() if isinstance(value, str) else bytes(value)
        self._ask("set", key, content.hex())

    def get(self, key: str) -> bytes:
        return bytes.fromhex(self._ask("get", key))

    def wait(self, keys: Sequence[str], *_: object) -> None:
        for key in keys:
            self._ask("get", key)

    def _ask(self, kind: str, key: str, value: str = "") -> str:
        asked = Message(kind, {"key": f"{self._prefix}/{key}", "value": value})
        try:
            send(self._connection, asked, self._limit_s, _DRIVER)
            return str(receive(self._connection, self._limit_s, _DRIVER).fields["value"])
        except WorkerError as error:
            raise RuntimeError(str(error)) from error


class Rendezvous:
    """The store itself. It stands in the driver, because a store that died with a worker could gather no survivors."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        """Listen at a port that the system chooses.

        Args: host: address of this host that all members can reach.
        Raises: WorkerError when this host has no such address.
        """
        self.host = host
        self._secret = new_token()
        self._listener = listen(f"tcp:{host}:0")
        port = int(self._listener.address.rpartition(":")[2])
        self.address = StoreAddress(host, port, self._secret.hex())
        self._values: dict[str, str] = {}
        self._waiting: dict[str, list[Link]] = {}
        self._closing = False
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._greet)
        self._selector.register(self._woken, selectors.EVENT_READ, lambda: None)
        self._thread = threading.Thread(target=self._serve, name="millrace-rendezvous", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening. Groups that have formed go on; no new one can. A second call does nothing."""
        if not self._closing:
            self._closing = True
            self._wake.close()
            self._thread.join()

    # All below runs in the thread.

    def _serve(self) -> None:
        try:
            while not self._closing:
                for key, _ in self._selector.select(_LOOK_S):
                    key.data()
                self._greet()
        finally:
            for key in list(self._selector.get_map().values()):
                if isinstance(key.fileobj, socket.socket):
                    key.fileobj.close()
            self._listener.close()
            self._selector.close()

    def _greet(self) -> None:
        for connection, _ in self._listener.ready(self._secret):
            self._selector.register(connection, selectors.EVENT_READ, partial(self._hear, Link(connection)))

    def _hear(self, link: Link) -> None:
        messages, more = link.read()
        for message in messages:
            key = str(message.fields["key"])
            if message.kind == "set":
                self._values[key] = str(message.fields["value"])
                link.send(Message("told", {"value": ""}))
                for other in self._waiting.pop(key, ()):
                    other.send(Message("told", {"value": self._values[key]}))
            elif key in self._values:
                link.send(Message("told", {"value": self._values[key]}))
            else:
                self._waiting.setdefault(key, []).append(link)
        if not more:
            self._selector.unregister(link.connection)
            link.close()
