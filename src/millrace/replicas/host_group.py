"""A group whose ranks have their tensors on GPUs, and add them up in host memory by another group.

For ranks that share a GPU or have no NCCL, and for gradients that are narrowed on the wire.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from millrace.replicas.collective import Group, Handle
from millrace.replicas.torch_group import spaces


class HostGroup(Group):
    """One rank's end.

    Args: inner: the group of the hosts. device: where this rank's tensors are. The others as of `inner`.
    """

    def __init__(self, inner: Group, device: torch.device, *, abandoned: Callable[[], bool], timeout_s: float) -> None:
        super().__init__(inner.generation, inner.rank, inner.size, abandoned, timeout_s)
        self.works_in_wait, self.overlaps, self.device_type = inner.works_in_wait, inner.overlaps, device.type
        self._inner, self._device = inner, device
        self._on_host: dict[int, Tensor] = {}  # by bucket; kept from step to step
        self._flights: dict[int, tuple[Handle, tuple[Tensor, ...]]] = {}

    def limit_waits(self, timeout_s: float) -> None:
        """See `Group.limit_waits`."""
        super().limit_waits(timeout_s)
        self._inner.limit_waits(timeout_s)

    def _release(self) -> None:
        self._inner.abandon()
        self._flights.clear()
        self._on_host.clear()

    def _begin(self, bucket_index: int, tensors: tuple[Tensor, ...], weight: float) -> None:
        flat = self._flat(bucket_index, tensors[0].dtype, sum(tensor.numel() for tensor in tensors))
        for tensor, space in spaces(tensors, flat):
            space.copy_(tensor, non_blocking=True)
        self._wait_for_device()
        self._flights[bucket_index] = self._inner.all_reduce_begin(bucket_index, [flat], weight), tensors

    def _finish(self, bucket_indices: Sequence[int]) -> None:
        flights = [self._flights.pop(bucket_index) for bucket_index in bucket_indices]
        self._inner.wait([handle for handle, _ in flights])
        for handle, tensors in flights:
            for tensor, space in spaces(tensors, self._on_host[handle.bucket_index]):
                tensor.copy_(space, non_blocking=True)  # before whatever the device is told next

    def _broadcast(self, tensors: Sequence[Tensor], source: int) -> None:
        is_source = self.rank == source
        on_host = [tensor.cpu() if is_source else torch.empty_like(tensor, device="cpu") for tensor in tensors]
        self._inner.broadcast(on_host, source)
        for tensor, values in zip(tensors, on_host, strict=True):
            if not is_source:
                tensor.copy_(values)

    def _wait_for_device(self) -> None:
        """Until what the device was told to copy is there."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _flat(self, bucket_index: int, dtype: torch.dtype, count: int) -> Tensor:
        """Host memory for a bucket, page-locked for a GPU, which copies to and from no other without waiting."""
        found = self._on_host.get(bucket_index)
        if found is None or found.dtype != dtype or found.numel() != count:
            pinned = self._device.type == "cuda"
            found = self._on_host[bucket_index] = torch.empty(count, dtype=dtype, pin_memory=pinned)
        return found
