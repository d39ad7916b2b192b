"""Workers on several hosts: gloo's point-to-point messages over TCP, one tag for each edge.

A message is 64 bytes that hold the step, then the tensor's bytes, or its code, whose length stands beside the step.
Receives are posted when the step begins, so that data comes in while the worker computes. What gloo is like, and how
that is met:

- Whether an operation is done cannot be asked, only waited for. The buffer of a send is waited for when the next step
  needs it. Every message finds a receive that is posted for it, also when its step is given up, so that this is short.
- A message may be shorter than the receive that is posted for it, so codes of any length fit.
- A wait that runs out of time closes all connections of the group. So a time-out ends this transport, and the peers
  see that: after an error, make a new one.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import FileStore, ProcessGroupGloo, Work  # type: ignore[attr-defined]

from millrace.errors import GraphError, WorkerError
from millrace.partition.program import Edge
from millrace.runtime.transport.base import Transport, describe, left_behind, peer_ended, timed_out

_HEADER_BYTES = 64  # keeps the data aligned
_LEAST_S = 0.001  # gloo counts in milliseconds, and takes none for no limit
_TIMED_OUT = "Timed out"


class _Frame:
    """A buffer that holds a message of an edge, and space for the longest one."""

    def __init__(self, edge: Edge) -> None:
        spec = edge.carried
        self.whole = torch.zeros(_HEADER_BYTES + spec.size_bytes, dtype=torch.uint8)
        self._step, self._length = self.whole[:16].view(torch.int64)
        self._space = self.whole[_HEADER_BYTES:].view(spec.dtype).view(spec.shape)
        self._is_code = edge.codec is not None

    @property
    def step(self) -> int:
        return int(self._step)

    @property
    def tensor(self) -> Tensor:
        """The message's tensor or code."""
        return self._space[: int(self._length)] if self._is_code else self._space

    def fill(self, step: int, tensor: Tensor) -> Tensor:
        """Make it a message; returns the bytes to send."""
        self._step.fill_(step)
        if self._is_code:
            self._length.fill_(tensor.nbytes)
        self.tensor.copy_(tensor)
        return self.whole[: _HEADER_BYTES + tensor.nbytes]


class _Outgoing:
    """An edge that begins here. work: the send that still has the frame, if any."""

    def __init__(self, edge: Edge) -> None:
        self.frame = _Frame(edge)
        self.work: Work | None = None


class _Incoming:
    """An edge that ends here.

    posted: the receives that gloo has, oldest first, which is the order in which it fills them. free: frames of none.
    wanted: how many there must be: one for this step, and one for every step since the last tensor that was received,
    because its message may be under way as well.
    """

    def __init__(self, edge: Edge) -> None:
        self.posted: deque[tuple[Work, _Frame]] = deque()
        self.free = [_Frame(edge)]
        self.wanted = 0


class GlooTransport(Transport):
    """One worker's end; `connect` makes it. Its received tensors are views of buffers that the next step fills."""

    def __init__(
        self, device: str, devices: Sequence[str], edges: Iterable[Edge], group: ProcessGroupGloo, send_timeout_s: float
    ) -> None:
        super().__init__(device, edges)
        self._rank_of = {name: rank for rank, name in enumerate(devices)}
        self._group: ProcessGroupGloo | None = group
        self._send_timeout_s = send_timeout_s
        self._outgoing = {edge.number: _Outgoing(edge) for edge in self.outgoing.values()}
        self._incoming = {edge.number: _Incoming(edge) for edge in self.incoming.values()}

    def close(self) -> None:
        for side in self._outgoing.values():
            side.work = None
        for end in self._incoming.values():
            end.posted.clear()
        self._group = None

    def _on_begin_step(self) -> None:
        group = self._open()
        for edge in self.incoming.values():
            end = self._incoming[edge.number]
            end.wanted += 1
            while len(end.posted) < end.wanted:
                frame = end.free.pop() if end.free else _Frame(edge)
                with self._naming(edge, edge.source, 0.0):
                    work = group.recv([frame.whole], self._rank_of[edge.source], edge.number)  # type: ignore[attr-defined]
                end.posted.append((work, frame))

    def _put(self, edge: Edge, tensor: Tensor) -> None:
        group, side = self._open(), self._outgoing[edge.number]
        with self._naming(edge, edge.target, self._send_timeout_s):
            if side.work is not None:
                side.work.wait(datetime.timedelta(seconds=self._send_timeout_s))
            message = side.frame.fill(self.step, tensor)
            side.work = group.send([message], self._rank_of[edge.target], edge.number)  # type: ignore[attr-defined]

    def _take(self, edge: Edge, timeout_s: float) -> Tensor:
        self._open()
        end, deadline_s = self._incoming[edge.number], time.monotonic() + timeout_s
        while end.posted:
            work, frame = end.posted.popleft()
            with self._naming(edge, edge.source, timeout_s):
                work.wait(datetime.timedelta(seconds=max(deadline_s - time.monotonic(), _LEAST_S)))
            end.free.append(frame)
            if frame.step > self.step:
                raise left_behind(edge, self.step, frame.step)
            if frame.step == self.step:
                end.wanted = 0
                return frame.tensor
        raise GraphError(f"{self.device} is to receive on {describe(edge)} twice in step {self.step}.")

    @contextlib.contextmanager
    def _naming(self, edge: Edge, peer: str, timeout_s: float) -> Iterator[None]:
        """What gloo raises, with who waited for what."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, WorkerError):
                raise
            if _TIMED_OUT not in str(error):
                raise peer_ended(self.device, peer, self.step, edge, _first_line(error)) from error
            if peer == edge.source:
                raise timed_out(edge, self.step, timeout_s) from error
            raise WorkerError(
                f"{self.device} waited {timeout_s:g} s in step {self.step} to send on {describe(edge)}, because {peer} "
                "has not taken the message of the step before. It may be stuck or stopped: look at what it does."
            ) from error

    def _open(self) -> ProcessGroupGloo:
        if self._group is None:
            raise WorkerError(f"{self.device}: its transport is closed.")
        return self._group


def connect(
    device: str,
    devices: Sequence[str],
    edges: Iterable[Edge],
    store: Path,
    timeout_s: float,
    address: str = "127.0.0.1",
) -> GlooTransport:
    """This worker's transport, once all workers have come.

    Anyone who can reach the addresses can send to it: use a network of your own.

    Args:
        device: this worker's.
        devices: all of them, in the same order for every worker.
        edges: all of the partition, in the same order for every worker.
        store: where they meet: a new file that all can reach.
        timeout_s: seconds for the others to come, and later for a peer to take the message before.
        address: of the network interface of this host that tensors go through.

    Raises:
        WorkerError: a worker did not come in time.
    """
    rank, limit = list(devices).index(device), datetime.timedelta(seconds=timeout_s)
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname=address, lazy_init=False)]
    options._timeout = limit
    try:
        meeting = FileStore(str(store), len(devices))
        meeting.set_timeout(limit)
        group = ProcessGroupGloo(meeting, rank, len(devices), options)
    except RuntimeError as error:
        others = ", ".join(name for name in devices if name != device)
        raise WorkerError(
            f"{device} could not connect with {others} in {timeout_s:g} s: {_first_line(error)} See whether these "
            f"workers have started, meet at the same place ({store}), and can reach this host as {address}."
        ) from error
    return GlooTransport(device, devices, edges, group, timeout_s)


def _first_line(error: RuntimeError) -> str:
    return str(error).partition("\n")[0].strip()
