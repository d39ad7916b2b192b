"""Where the members of a group find each other: a key-value store in the driver, which outlives all workers."""

from __future__ import annotations

import datetime
import secrets
import socket
from dataclasses import dataclass

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from millrace.errors import WorkerError

_BACKLOG = 1024
_PREFIX_BYTES = 16
GRACE_S = 1.0  # what blocks in torch ends that long after whoever waits for it has said so in words of ours


@dataclass(frozen=True)
class StoreAddress:
    """Where a store listens. prefix: of all keys of this run, so that no other run's members come by mistake."""

    host: str
    port: int
    prefix: str

    def connect(self, generation: int, timeout_s: float) -> Store:
        """The store as the members of one generation see it. It blocks: call it through `Patience.call`.

        Args: timeout_s: for the connection, and later for every wait for a key; `GRACE_S` is added.
        Raises: RuntimeError, of torch's, when there is no store or it does not answer in time.
        """
        limit = datetime.timedelta(seconds=timeout_s + GRACE_S)
        store = TCPStore(self.host, self.port, is_master=False, wait_for_workers=False, timeout=limit)
        named = PrefixStore(f"{self.prefix}/g{generation}", store)
        named.set_timeout(limit)
        return named


class Rendezvous:
    """The store itself. It stands in the driver, because a store that died with a worker could gather no survivors.

    Anyone who can reach the port can take part: torch's store knows no passwords, and lists its keys to whoever asks.
    So it listens at one address only; let that be of a network of your own.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        """Listen at a port that the system chooses.

        Args: host: address of this host that all members can reach.
        Raises: WorkerError when this host has no such address.
        """
        try:
            # torch's own server would listen on all addresses of this host.
            listening = socket.create_server((host, 0), backlog=_BACKLOG)
        except OSError as error:
            raise WorkerError(
                f"The driver cannot listen at {host}: {error}. Give it an address that this host has."
            ) from error
        self.host = host
        port = listening.getsockname()[1]
        self._store: TCPStore | None = TCPStore(
            host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )
        self.address = StoreAddress(host, port, secrets.token_hex(_PREFIX_BYTES))

    def close(self) -> None:
        """Stop listening. Groups that have formed go on; no new one can."""
        self._store = None
