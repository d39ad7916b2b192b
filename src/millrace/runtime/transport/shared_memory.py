"""Workers that are processes of one host: the sender copies into shared memory, the receiver reads it there.

Beside the memory, every two workers that have edges share a socket. The sender rings (one byte) after it has filled a
slot; the slot itself says which step it holds. So a ring may be lost when the receiver has too many unread: it will
wake up and look. And when a worker ends, however it does, the system closes its sockets and the others know.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from millrace.errors import WorkerError
from millrace.partition.program import Edge
from millrace.runtime.transport.base import Transport, left_behind, peer_ended, timed_out
from millrace.runtime.transport.meeting import Peer, meet
from millrace.runtime.transport.slots import Region, allocate

SPIN_S = 100e-6  # look that long before sleeping; docs/decisions/0014-transports.md has the measurement
_DRAIN_BYTES = 4096


class SharedMemoryTransport(Transport):
    """One worker's end; `connect` makes it.

    A received tensor is the slot itself: it shows the next step's values as soon as the sender has them, which is not
    before the driver begins that step. Copy what must live longer.
    """

    def __init__(
        self, device: str, edges: Sequence[Edge], own: Region, peers: Iterable[Peer], spin_s: float = SPIN_S
    ) -> None:
        super().__init__(device, edges)
        self._own = own
        self._spin_s = spin_s
        self._connections = {peer.device: peer.connection for peer in peers}
        self._regions: dict[str, Region] = {}
        self._poll = select.poll()
        self._device_of: dict[int, str] = {}
        for peer in peers:
            theirs = [edge for edge in edges if edge.source == peer.device]
            self._regions[peer.device] = Region(peer.region, theirs)
            self._poll.register(peer.connection, select.POLLIN)
            self._device_of[peer.connection.fileno()] = peer.device

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        # The memory goes when the last tensor that lies in it does.
        self._connections.clear()
        self._regions.clear()

    def _on_begin_step(self) -> None:
        pass

    def _put(self, edge: Edge, tensor: Tensor) -> None:
        connection = self._connections.get(edge.target)
        if connection is None:
            raise WorkerError(f"{self.device}: its transport is closed.")
        self._own.write(edge.number, self.step, tensor)
        with contextlib.suppress(BlockingIOError):  # it has rings to read already
            try:
                connection.send(b"!")
            except ConnectionError as error:
                raise peer_ended(self.device, edge.target, self.step, edge) from error

    def _take(self, edge: Edge, timeout_s: float) -> Tensor:
        region = self._regions.get(edge.source)
        if region is None:
            raise WorkerError(f"{self.device}: its transport is closed.")
        if not self._has_come(region, edge) and not self._spin(region, edge, min(self._spin_s, timeout_s)):
            self._sleep(region, edge, timeout_s)
        return region.tensor(edge.number)

    def _has_come(self, region: Region, edge: Edge) -> bool:
        step = region.step(edge.number)
        if step > self.step:
            raise left_behind(edge, self.step, step)
        return step == self.step

    def _spin(self, region: Region, edge: Edge, spin_s: float) -> bool:
        """Look for a short while, and let others have the processor between two looks."""
        until_s = time.monotonic() + spin_s
        while time.monotonic() < until_s:
            os.sched_yield()
            if self._has_come(region, edge):
                return True
        return False

    def _sleep(self, region: Region, edge: Edge, timeout_s: float) -> None:
        """Sleep until the slot is filled; any peer that ends meanwhile ends the step."""
        deadline_s = time.monotonic() + timeout_s
        while not self._has_come(region, edge):
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise timed_out(edge, self.step, timeout_s)
            for descriptor, _ in self._poll.poll(left_s * 1000):
                peer = self._device_of[descriptor]
                if self._drain(peer):
                    continue
                if self._has_come(region, edge):  # it may have sent, and ended then
                    return
                raise peer_ended(self.device, peer, self.step, edge if peer == edge.source else None)

    def _drain(self, peer: str) -> bool:
        """Read a peer's rings. False when it has ended."""
        try:
            return bool(self._connections[peer].recv(_DRAIN_BYTES))
        except BlockingIOError:
            return True
        except ConnectionError:
            return False


def connect(
    device: str, edges: Iterable[Edge], directory: Path, timeout_s: float, spin_s: float = SPIN_S
) -> SharedMemoryTransport:
    """This worker's transport, once all workers that it has edges with have come.

    Args:
        device: this worker's.
        edges: all of the partition, in the same order for every worker.
        directory: of the driver, mode 0700, new for every run, the same for every worker.
        timeout_s: seconds for the others to come.
        spin_s: how long a receiver looks before it sleeps.

    Raises:
        WorkerError: a worker did not come in time, or there is too little memory.
        SettingError: others can enter the directory; the system is not Linux.
    """
    edges = tuple(edges)
    leaving = [edge for edge in edges if edge.source == device]
    descriptor = allocate(device, leaving)
    peers: list[Peer] = []
    try:
        peers = meet(device, edges, descriptor, directory, timeout_s)
        return SharedMemoryTransport(device, edges, Region(descriptor, leaving), peers, spin_s)
    finally:
        os.close(descriptor)
        for peer in peers:
            os.close(peer.region)
