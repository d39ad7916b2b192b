"""Between host memory, where batches, messages and transports have their tensors, and the device that computes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from millrace.partition.program import Edge


class Staging:
    """The copies of one program's tensors to its device and back. On a CPU there is nothing to copy.

    What a GPU receives goes through a page-locked buffer of its edge, from which it is copied while the host goes on: a
    copy from ordinary memory would first wait for all that the GPU has still to do. The buffers are filled once a step;
    `wait` at the end of a step makes that safe.

    Args: incoming: the edges that end here.
    """

    def __init__(self, device: torch.device, incoming: Iterable[Edge]) -> None:
        self.device = device
        self._on_host = device.type == "cpu"
        self._buffers = {} if self._on_host else {edge.number: _page_locked(edge) for edge in incoming}

    def to_device(self, tensor: Tensor) -> Tensor:
        """A tensor of a batch, where the device reads it."""
        return tensor if self._on_host else tensor.to(self.device)

    def received(self, edge: int, tensor: Tensor) -> Tensor:
        """What came over an edge, where the device reads it. `tensor` may be overwritten as soon as this returns."""
        if self._on_host:
            return tensor
        return self._buffers[edge].copy_(tensor).to(self.device, non_blocking=True)

    def to_host(self, tensor: Tensor) -> Tensor:
        """A result, in host memory and whole."""
        return tensor if self._on_host else tensor.cpu()

    def wait(self) -> None:
        """Until the device has done all that it was told to."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _page_locked(edge: Edge) -> Tensor:
    return torch.empty(edge.spec.shape, dtype=edge.spec.dtype, pin_memory=True)
