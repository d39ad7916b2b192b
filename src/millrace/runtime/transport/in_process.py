"""All devices in one process, a thread each: tensors are copied into a table that all can see."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

import torch
from torch import Tensor

from millrace.errors import WorkerError
from millrace.partition.program import Edge
from millrace.runtime.transport.base import Transport, left_behind, peer_ended, timed_out


class _Table:
    """Edge number -> (step, tensor); guarded by `changed`. ended: the devices whose transport is closed."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.messages: dict[int, tuple[int, Tensor]] = {}
        self.ended: set[str] = set()


class InProcessTransport(Transport):
    """One device's end; `connect` makes them all."""

    def __init__(self, device: str, edges: Iterable[Edge], table: _Table) -> None:
        super().__init__(device, edges)
        self._table = table

    def close(self) -> None:
        with self._table.changed:
            self._table.ended.add(self.device)
            self._table.changed.notify_all()

    def _on_begin_step(self) -> None:
        pass

    def _put(self, edge: Edge, tensor: Tensor) -> None:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
        with self._table.changed:
            if edge.target in self._table.ended:
                raise peer_ended(self.device, edge.target, self.step, edge)
            self._table.messages[edge.number] = (self.step, copy)
            self._table.changed.notify_all()

    def _take(self, edge: Edge, timeout_s: float) -> Tensor:
        deadline_s = time.monotonic() + timeout_s
        with self._table.changed:
            while True:
                step, tensor = self._table.messages.get(edge.number, (-1, None))
                if tensor is not None and step == self.step:
                    del self._table.messages[edge.number]
                    return tensor
                if step > self.step:
                    raise left_behind(edge, self.step, step)
                if edge.source in self._table.ended:
                    raise peer_ended(self.device, edge.source, self.step, edge)
                if self.device in self._table.ended:
                    raise WorkerError(f"{self.device}: its transport was closed while it waited in step {self.step}.")
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise timed_out(edge, self.step, timeout_s)
                self._table.changed.wait(left_s)


def connect(devices: Iterable[str], edges: Iterable[Edge]) -> dict[str, InProcessTransport]:
    """The transports of all devices, by device."""
    edges, table = tuple(edges), _Table()
    return {device: InProcessTransport(device, edges, table) for device in devices}
