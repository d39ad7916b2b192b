"""What every transport does: it carries the tensors of a partition's edges, each once a step.

A worker has one `Transport`, made before the first step for edges that are all known, and uses it from one thread:

    begin_step(step) → send(edge, tensor) … recv(edge, timeout_s) … → begin_step(step + 1) → …

What the driver promises: it begins every step on all workers, each only when the one before it is over on all of them,
finished or given up, and gives every step a greater number than all before it, also when it tries one again. So the
buffers of an edge are free when a step begins, and a message that carries a smaller number belongs to a step that was
given up: it is dropped. One that carries a greater number says that the waiting worker itself has been left behind.

Where an edge has a codec, what crosses is the tensor's code, made by the sender and undone by the receiver.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from millrace.errors import GraphError, WorkerError
from millrace.graph.signature import TensorSpec
from millrace.partition.program import Edge
from millrace.runtime.transport.codecs import decode, encode


class Transport(ABC):
    """One worker's ends of the edges that begin or end at its device.

    Args:
        device: the worker's device.
        edges: all edges of the partition, in the same order for every worker; those of other pairs are ignored.

    sent_bytes: edge number -> bytes of the code that was sent this step, for edges that have a codec.
    """

    def __init__(self, device: str, edges: Iterable[Edge]) -> None:
        edges = tuple(edges)
        self.device = device
        self.outgoing = {edge.number: edge for edge in edges if edge.source == device}
        self.incoming = {edge.number: edge for edge in edges if edge.target == device}
        self.step = -1
        self.sent_bytes: dict[int, int] = {}
        self._last_code: tuple[str, Tensor] | None = None  # of the value that was encoded last
        self._decoded: dict[int, Tensor] = {}  # edge number -> the tensor that its code is turned into

    def begin_step(self, step: int) -> None:
        """Say which step the following sends and receives are of. Tensors received in the step before end here.

        Raises:
            WorkerError: the number is not greater than the last one, or a peer is known to have ended.
        """
        if step <= self.step:
            raise WorkerError(
                f"{self.device}: the driver began step {step} after step {self.step}. "
                "Every step needs a greater number than the one before, also when it is tried again."
            )
        self.step = step
        self.sent_bytes.clear()
        self._last_code = None
        self._on_begin_step()

    def send(self, edge_number: int, tensor: Tensor) -> None:
        """Put a tensor on an edge, without waiting for its receiver. Its memory may be overwritten afterwards.

        Args:
            edge_number: of an edge that begins here.
            tensor: of the edge's shape and dtype, with any strides, on any device; one of a GPU is waited for.
                The same, where one value is sent on several edges.

        Raises:
            GraphError: the edge does not begin here, or the tensor is of another shape or dtype.
            WorkerError: the receiver has ended. Not every transport learns that in the same step.
        """
        edge = self.outgoing.get(edge_number)
        if edge is None:
            raise GraphError(f"{self.device} is to send on edge {edge_number}, which does not begin there.")
        if not edge.spec.fits(tensor):
            raise GraphError(f"{describe(edge)} carries {edge.spec}, but {TensorSpec.of(tensor)} was to be sent.")
        self._put(edge, tensor.detach() if edge.codec is None else self._encoded(edge, edge.codec, tensor))

    def recv(self, edge_number: int, timeout_s: float) -> Tensor:
        """Wait for the tensor of this step on an edge.

        Args:
            edge_number: of an edge that ends here; once a step.
            timeout_s: seconds to wait at most.

        Returns:
            A contiguous tensor in CPU memory that holds the sender's values until the next `begin_step`: bit for bit,
            or as near as the edge's codec brings them.

        Raises:
            GraphError: the edge does not end here.
            WorkerError: it did not come in time, the sender has ended, or the sender is in a later step.
        """
        edge = self.incoming.get(edge_number)
        if edge is None:
            raise GraphError(f"{self.device} is to receive on edge {edge_number}, which does not end there.")
        found = self._take(edge, timeout_s)
        if edge.codec is None:
            return found
        if edge_number not in self._decoded:
            self._decoded[edge_number] = torch.empty(edge.spec.shape, dtype=edge.spec.dtype)
        decode(edge.codec, found, self._decoded[edge_number])
        return self._decoded[edge_number]

    def _encoded(self, edge: Edge, codec: str, tensor: Tensor) -> Tensor:
        """The code of a tensor; a value that goes to several devices is encoded once."""
        if self._last_code is not None and self._last_code[0] == edge.value:
            code = self._last_code[1]
        else:
            code = encode(codec, tensor)
            # A tensor that travels as it is may lie in the caller's memory, and change.
            self._last_code = (edge.value, code) if code.nbytes < edge.spec.size_bytes else None
        self.sent_bytes[edge.number] = code.nbytes
        return code

    @abstractmethod
    def close(self) -> None:
        """Give everything back; the peers see that this worker has ended. A second call does nothing."""

    @abstractmethod
    def _on_begin_step(self) -> None: ...

    @abstractmethod
    def _put(self, edge: Edge, tensor: Tensor) -> None:
        """Carry a tensor of the kind `edge.carried`; a code may be shorter."""

    @abstractmethod
    def _take(self, edge: Edge, timeout_s: float) -> Tensor:
        """What was put there, as long as it was."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def describe(edge: Edge) -> str:
    """The edge as errors name it."""
    return f"edge {edge.number} ({edge.value!r}, {edge.source} to {edge.target})"


def timed_out(edge: Edge, step: int, timeout_s: float) -> WorkerError:
    """The error of a receiver whose time is up."""
    return WorkerError(
        f"{edge.target} waited {timeout_s:g} s in step {step} for {edge.value!r} ({edge.spec}, edge {edge.number}) "
        f"from {edge.source}, which has not ended but sent nothing. It may be slow, stuck or stopped: "
        "look at what it does, or allow more time."
    )


def peer_ended(device: str, peer: str, step: int, edge: Edge | None = None, reason: str = "") -> WorkerError:
    """The error of a worker whose peer has closed its connection."""
    what = f", which was to carry {describe(edge)}" if edge else ""
    said = f" The transport said: {reason}" if reason else ""
    return WorkerError(
        f"{device}: the connection with {peer}{what}, ended in step {step}. Its worker died, or gave up after an error "
        f"of its own: look at its log.{said}"
    )


def left_behind(edge: Edge, step: int, found: int) -> WorkerError:
    """The error of a receiver that still waits in a step that the sender has left."""
    return WorkerError(
        f"{edge.target} waited in step {step} for {describe(edge)}, but {edge.source} is already in step {found}: "
        f"the driver gave up step {step}. Nothing is to be done here; take part in the next step."
    )
