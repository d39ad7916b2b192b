"""The memory that a worker shares with those it sends to: a slot for every edge that begins there.

    | step, length of edge 0 | data of edge 0 … | step, length of edge 1 | data of edge 1 … |

Each part begins at a multiple of 64 bytes. A slot's step is written after its data: who reads the step that it waits
for may read the data. The length counts where an edge carries codes, which may be shorter than the slot. The region has
no name, only descriptors, so that the system takes it back when the last process that has one is gone, however that
ended.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from millrace.errors import SettingError, WorkerError
from millrace.graph.signature import TensorSpec
from millrace.partition.program import Edge

_ALIGN_BYTES = 64
_FENCE = threading.Lock()


class Region:
    """A mapped region."""

    def __init__(self, descriptor: int, edges: Iterable[Edge]) -> None:
        edges = tuple(edges)
        offsets, size_bytes = layout(edges)
        memory = mmap.mmap(descriptor, size_bytes, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        self._words = memoryview(memory).cast("Q")
        self._step_at = {number: offset // 8 for number, offset in offsets.items()}
        self._slots = {edge.number: _slot(whole, offsets[edge.number] + _ALIGN_BYTES, edge.carried) for edge in edges}
        self._shorter = {edge.number for edge in edges if edge.codec is not None}

    def step(self, number: int) -> int:
        """The last step that wrote the edge's slot; -1 before the first."""
        found = self._words[self._step_at[number]]
        order_memory()
        return found - 1

    def write(self, number: int, step: int, tensor: Tensor) -> None:
        """Fill a slot, and say so."""
        if number in self._shorter:
            self._words[self._step_at[number] + 1] = tensor.numel()
            self._slots[number][: tensor.numel()].copy_(tensor)
        else:
            self._slots[number].copy_(tensor)
        order_memory()
        self._words[self._step_at[number]] = step + 1

    def tensor(self, number: int) -> Tensor:
        """What lies in a slot."""
        slot = self._slots[number]
        return slot[: self._words[self._step_at[number] + 1]] if number in self._shorter else slot


def layout(edges: Iterable[Edge]) -> tuple[Mapping[int, int], int]:
    """Where the slots begin, by edge number, and the size of the region in bytes."""
    offsets, end = {}, 0
    for edge in edges:
        offsets[edge.number] = end
        data_bytes = -(-edge.carried.size_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
        end += _ALIGN_BYTES + data_bytes
    return offsets, max(end, _ALIGN_BYTES)


def allocate(device: str, edges: Iterable[Edge]) -> int:
    """A new region for these edges, with its memory taken now rather than when a step first writes.

    Returns: a descriptor of it.
    Raises: WorkerError when there is too little memory; SettingError on a system that has no anonymous regions.
    """
    descriptor = allocate_bytes(device, layout(edges)[1])
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
    return descriptor


def allocate_bytes(who: str, size_bytes: int) -> int:
    """A new region of that size, with its memory taken now.

    Returns: a descriptor of it.
    Raises: WorkerError when there is too little memory; SettingError on a system that has no anonymous regions.
    """
    if not hasattr(os, "memfd_create"):
        raise SettingError(f"{who}: shared memory between processes needs Linux. Use another transport here.")
    # Asked for more than there is, the system would end some process rather than refuse.
    if size_bytes > _available_bytes():
        raise _no_memory(who, size_bytes, "the system has less")
    descriptor = os.memfd_create("millrace", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
        # A peer that made the region smaller would end every process that reads it.
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError as error:
        os.close(descriptor)
        raise _no_memory(who, size_bytes, str(error)) from error
    return descriptor


def _no_memory(who: str, size_bytes: int, reason: str) -> WorkerError:
    return WorkerError(
        f"{who}: {size_bytes:,} bytes of shared memory for what it sends or holds could not be had: {reason}. "
        "Let fewer or smaller tensors be shared, or use a machine with more memory."
    )


def _available_bytes() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return math.inf


def _slot(whole: Tensor, offset: int, spec: TensorSpec) -> Tensor:
    if spec.size_bytes == 0:
        return torch.empty(spec.shape, dtype=spec.dtype)
    return whole[offset : offset + spec.size_bytes].view(spec.dtype).view(spec.shape)


def order_memory() -> None:
    """What was read or written before stays before what comes after, also on processors that reorder.

    Python has no fence. A lock that is given back is a release and one that is taken an acquisition, and an acquisition
    does not overtake a release before it.
    """
    with _FENCE:
        pass
    with _FENCE:
        pass
