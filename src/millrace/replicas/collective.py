"""Ranks that add up their gradients: the contract of a group.

A group is made for one generation and never mended: when a member is lost, all survivors abandon it and make the next.
Of the kinds two have tensors on CPUs: `gloo_group.GlooGroup` for ranks on any hosts, and `shared_group.SharedGroup` for
ranks of one host. Two have them on GPUs: `nccl_group.NcclGroup`, where every rank has a GPU of its own, and
`host_group.HostGroup`, which copies them to the host and hands them to one of the others.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from millrace.errors import SettingError, WorkerError
from millrace.replicas.buckets import divide
from millrace.replicas.patience import Patience

REDUCED = (torch.float64, torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Handle:
    """A bucket whose all-reduce has begun."""

    generation: int
    bucket_index: int


class Group(abc.ABC):
    """One rank's end of a group. It is for one thread.

    Every rank makes the same calls in the same order, with tensors of the same sizes and dtypes. Any call may raise
    WorkerError: then the group has failed for good, and tensors that were being reduced hold garbage.

    works_in_wait: whether all-reduces that have begun get on only while somebody waits for them. overlaps: whether it
    is quicker to begin with the first gradients while the last are computed. device_type: where tensors are.
    """

    works_in_wait = True
    overlaps = False
    device_type = "cpu"

    def __init__(self, generation: int, rank: int, size: int, abandoned: Callable[[], bool], timeout_s: float) -> None:
        if not 0 <= rank < size:
            raise SettingError(f"A group of {size} has ranks 0 to {size - 1}, not {rank}.")
        self.generation, self.rank, self.size = generation, rank, size
        self._patience = Patience(f"Rank {rank} of {size} in generation {generation}", abandoned, timeout_s)
        self._failure: str | None = None
        self._begun: dict[int, tuple[Tensor, ...]] = {}

    def all_reduce(self, tensors: Sequence[Tensor], weight: float) -> None:
        """Make every tensor the sum over the ranks of weight × tensor, in place, with the same bits on all ranks.

        On CPUs the bits are also the same in every run with as many ranks.

        Args: tensors: float64, float32 or bfloat16, on the group's kind of device, any strides. weight: of this rank;
            all ranks' sum to 1.
        Raises: WorkerError when a member is lost, the group was abandoned, or the time is over. SettingError for
            other tensors.
        """
        buckets = divide([t.nbytes for t in tensors], [t.dtype for t in tensors])
        self._check(tensors, weight)
        self.wait([self.all_reduce_begin(n, [tensors[at] for at in b], weight) for n, b in enumerate(buckets)])

    def all_reduce_begin(self, bucket_index: int, tensors: Sequence[Tensor], weight: float) -> Handle:
        """Begin to all-reduce some tensors of one dtype, which must be left alone until `wait`.

        So the first gradients can travel while the later ones are computed. `buckets.divide` finds good buckets.

        Args: bucket_index: rises from call to call while others are under way, the same on all ranks. tensors, weight:
            as for `all_reduce`.
        Raises: as `all_reduce`.
        """
        self._refuse_if_failed()
        self._check(tensors, weight)
        if len(dtypes := {str(tensor.dtype) for tensor in tensors}) > 1:
            raise SettingError(
                f"Bucket {bucket_index} mixes {', '.join(sorted(dtypes))}: give it tensors of one dtype."
            )
        if self._begun and bucket_index <= max(self._begun):
            raise SettingError(
                f"Bucket {bucket_index} begins after bucket {max(self._begun)}: the numbers must rise, because ranks "
                "that begin buckets in different orders would add up different tensors."
            )
        own = tuple(tensor.detach() for tensor in tensors if tensor.numel())
        self._begun[bucket_index] = own
        if self.size == 1:
            for tensor in own if weight != 1.0 else ():
                tensor.mul_(weight)
        elif own:
            self._guarded(lambda: self._begin(bucket_index, own, weight))
        return Handle(self.generation, bucket_index)

    def wait(self, handles: Sequence[Handle]) -> None:
        """Return when these all-reduces are done, on all ranks with the same handles in the same order.

        Raises: as `all_reduce`.
        """
        self._refuse_if_failed()
        for handle in handles:
            if handle.generation != self.generation or handle.bucket_index not in self._begun:
                raise SettingError(f"{handle} is not under way in generation {self.generation}: wait for each once.")
        found = [(handle.bucket_index, self._begun.pop(handle.bucket_index)) for handle in handles]
        busy = [bucket_index for bucket_index, tensors in found if tensors]
        if busy and self.size > 1:
            self._guarded(lambda: self._finish(busy))

    def broadcast(self, tensors: Sequence[Tensor], source: int) -> None:
        """Give every rank the values of the source's tensors, in place.

        Args: tensors: of any dtype and strides, on the group's kind of device. source: a rank.
        Raises: WorkerError as `all_reduce`.
        """
        self._refuse_if_failed()
        if not 0 <= source < self.size:
            raise SettingError(f"A group of {self.size} has ranks 0 to {self.size - 1}, not {source}.")
        if self.size == 1:
            return
        own = [tensor.detach() for tensor in tensors if tensor.numel()]
        dense = [tensor.contiguous() for tensor in own]
        self._guarded(lambda: self._broadcast([_as_bytes(tensor) for tensor in dense], source))
        for tensor, values in zip(own, dense, strict=True):
            if tensor.data_ptr() != values.data_ptr():
                tensor.copy_(values)

    def limit_waits(self, timeout_s: float) -> None:
        """From the next call on, wait so long for the other ranks."""
        self._patience = replace(self._patience, timeout_s=timeout_s)

    def abandon(self) -> None:
        """Give the group up: it raises from now on. Tensors that are being reduced must not be used again."""
        self._end("it was abandoned")

    def close(self) -> None:
        """End this rank's part, when nothing is being reduced any more. It returns at once."""
        self._end("it is closed")

    def _end(self, reason: str) -> None:
        self._failure = self._failure or reason
        self._begun.clear()
        self._release()

    @abc.abstractmethod
    def _release(self) -> None:
        """Free what is not in use any more, without waiting; it may be called twice."""

    @abc.abstractmethod
    def _begin(self, bucket_index: int, tensors: tuple[Tensor, ...], weight: float) -> None:
        """Begin an all-reduce of at least one element, of one dtype, with other ranks."""

    @abc.abstractmethod
    def _finish(self, bucket_indices: Sequence[int]) -> None:
        """Wait until these are done."""

    @abc.abstractmethod
    def _broadcast(self, tensors: Sequence[Tensor], source: int) -> None:
        """tensors: flat uint8, not empty."""

    def _check(self, tensors: Sequence[Tensor], weight: float) -> None:
        if not math.isfinite(weight):
            raise SettingError(f"A rank's weight is its share of the examples, not {weight}.")
        for place, tensor in enumerate(tensors):
            if tensor.dtype not in REDUCED or tensor.device.type != self.device_type:
                raise SettingError(
                    f"all_reduce takes float64, float32 and bfloat16 tensors on {self.device_type} devices; tensor "
                    f"{place} is {tensor.dtype} on {tensor.device}. A mean of anything else is not exact: convert it "
                    "first."
                )

    def _refuse_if_failed(self) -> None:
        if self._failure is not None:
            raise WorkerError(f"{self._patience.who}: its group can be used no more, because {self._failure}.")

    def _guarded(self, action: Callable[[], None]) -> None:
        """Whatever ends an action early (also Ctrl-C) leaves the ranks at different places: the group has failed."""
        try:
            action()
        except BaseException as error:
            first_line = str(error).partition("\n")[0].strip()
            self._end(f"it failed before ({first_line or type(error).__name__})")
            raise


def _as_bytes(tensor: Tensor) -> Tensor:
    # A tensor of one element counts as contiguous whatever its stride; only stride 1 shows as bytes.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
