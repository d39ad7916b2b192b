"""A group over one of torch.distributed's backends: tensors are packed, handed over, waited for and unpacked.

Which operations of two ranks belong together follows from the order in which each rank starts them.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, Work

from millrace.errors import WorkerError
from millrace.replicas.buckets import divide
from millrace.replicas.collective import Group

_CACHED_ELEMENTS = 1 << 17


@dataclass
class Flight:
    """Operations that follow each other. what: for messages. work: the one under way. then: what makes the next ones,
    or only puts results where they belong."""

    what: str
    work: Work | None
    then: list[Callable[[], Work | None]]


class TorchGroup(Group):
    """One rank's end. A subclass forms and frees the backend's own group, and gives it operations."""

    overlaps = True
    works_in_wait = False

    def __init__(self, generation: int, rank: int, size: int, abandoned: Callable[[], bool], timeout_s: float) -> None:
        super().__init__(generation, rank, size, abandoned, timeout_s)
        self._flights: dict[int, list[Flight]] = {}
        self._buffers: dict[tuple[int, str], Tensor] = {}

    @abc.abstractmethod
    def _operation(self, operation: Callable[[Any], Work]) -> Work:
        """Hand an operation to the backend's group, which does it beside this thread."""

    def _release(self) -> None:
        self._flights.clear()
        self._buffers.clear()

    def _all_reduce_flat(self, what: str, bucket_index: int, tensors: tuple[Tensor, ...], weight: float) -> Flight:
        """Begin to add up, as the backend does it."""
        if len(tensors) == 1 and tensors[0].is_contiguous() and tensors[0].dtype != torch.bfloat16:
            if weight != 1.0:
                tensors[0].mul_(weight)
            return self._start(what, lambda group: group.allreduce([tensors[0]]))
        dtype = torch.float32 if tensors[0].dtype == torch.bfloat16 else tensors[0].dtype
        flat = self._buffer((bucket_index, "packed"), tensors[0], dtype, sum(t.numel() for t in tensors))
        pack(tensors, weight, flat)
        return self._start(what, lambda group: group.allreduce([flat]), lambda: unpack(tensors, flat))

    def _finish(self, bucket_indices: Sequence[int]) -> None:
        self._land([flight for bucket_index in bucket_indices for flight in self._flights[bucket_index]])
        for bucket_index in bucket_indices:
            del self._flights[bucket_index]

    def _broadcast(self, tensors: Sequence[Tensor], source: int) -> None:
        flights = []
        for places in divide([tensor.nbytes for tensor in tensors], [None] * len(tensors)):
            own = tuple(tensors[place] for place in places)
            flat = own[0] if len(own) == 1 else torch.cat(own)
            flights.append(self._broadcast_start(own, flat, source))
        self._land(flights)

    def _broadcast_start(self, own: tuple[Tensor, ...], flat: Tensor, source: int) -> Flight:
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = source, 0
        then = [lambda: unpack(own, flat)] if flat is not own[0] else []
        what = f"{flat.nbytes:,} bytes from rank {source}"
        return self._start(what, lambda group: group.broadcast([flat], options), *then)

    def _start(self, what: str, operation: Callable[[Any], Work], *then: Callable[[], Work | None]) -> Flight:
        return Flight(what, self._operation(operation), list(then))

    def _land(self, flights: Sequence[Flight]) -> None:
        """Wait until all are done. They go on in the same order on all ranks, each to its second operation first."""
        waiting = list(flights)
        while waiting:
            for flight in waiting:
                self._advance(flight)
            waiting = [flight for flight in waiting if flight.work is not None]

    def _advance(self, flight: Flight) -> None:
        work, flight.work = flight.work, None
        if work is not None:
            self._patience.until(work.is_completed, lambda: flight.what)
            with naming(self._patience.who, flight.what):
                work.wait()
        while flight.then and flight.work is None:
            flight.work = flight.then.pop(0)()

    def _buffer(self, key: tuple[int, str], like: Tensor, dtype: torch.dtype, count: int) -> Tensor:
        """Space that is kept from step to step: fresh memory would cost about as much as the copy into it."""
        found = self._buffers.get(key)
        if found is None or found.dtype != dtype or found.numel() != count:
            found = self._buffers[key] = torch.zeros(count, dtype=dtype, device=like.device)
        return found


@contextlib.contextmanager
def naming(who: str, what: str) -> Iterator[None]:
    """What a backend raises, with who was at what."""
    try:
        yield
    except RuntimeError as error:
        first_line = str(error).partition("\n")[0].strip()
        raise WorkerError(
            f"{who} lost a member of its group in {what}: {first_line}. Make the next generation without it."
        ) from error


def spaces(tensors: Sequence[Tensor], flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each tensor, and its space in the flat one, of its shape."""
    at = 0
    for tensor in tensors:
        yield tensor, flat[at : at + tensor.numel()].view(tensor.shape)
        at += tensor.numel()


def pack(tensors: Sequence[Tensor], weight: float, flat: Tensor) -> None:
    """Put tensors times a weight into a flat one, which may be narrower."""
    for tensor, space in spaces(tensors, flat):
        if tensor.dtype == flat.dtype or not tensor.is_contiguous() or flat.device.type != "cpu":
            torch.mul(tensor, weight, out=space)
            continue
        # torch makes the product in a tensor of its own before it narrows it: let that fit into the cache.
        pieces = zip(tensor.view(-1).split(_CACHED_ELEMENTS), space.view(-1).split(_CACHED_ELEMENTS), strict=True)
        for own, there in pieces:
            torch.mul(own, weight, out=there)


def unpack(tensors: Sequence[Tensor], flat: Tensor) -> None:
    """The way back, without a weight."""
    for tensor, space in spaces(tensors, flat):
        tensor.copy_(space)
