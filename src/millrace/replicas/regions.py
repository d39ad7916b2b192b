"""Named tensors in memory that processes of one host share: a shard's variables, and a worker's mailbox.

    | version word, limit | tensor | tensor | …        each at a multiple of 64 bytes

Both words are for a shard's variables. The version word is a seqlock: twice the version while they can be read, an odd
number while they are being updated. Who reads the same even number before and after has read one version. Versions up
to the limit may be read without asking. The memory has no name, only descriptors that travel over a Unix socket, so
that the system takes it back when the last process is gone.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from millrace.errors import WorkerError
from millrace.graph.signature import TensorSpec
from millrace.runtime.transport.slots import allocate_bytes, order_memory

_ALIGN_BYTES = 64
_SEAL_FUTURE_WRITE = 0x10  # of Linux; Python names it from 3.13 on


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a region. offset: in bytes."""

    name: str
    spec: TensorSpec
    offset: int


def layout(specs: Mapping[str, TensorSpec]) -> tuple[tuple[Place, ...], int]:
    """The places of tensors in their order, and the size of their region in bytes."""
    places, end = [], _ALIGN_BYTES
    for name, spec in specs.items():
        places.append(Place(name, spec, end))
        end += -(-spec.size_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
    return tuple(places), end


class TensorRegion:
    """A mapped region.

    tensors: by name, in place. descriptor: of the memory; it is closed with the region,
    and the memory goes with the last tensor in it."""

    def __init__(self, descriptor: int, places: Sequence[Place], *, writable: bool = False) -> None:
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self.places = tuple(places)
        size_bytes = max((_end(place) for place in places), default=_ALIGN_BYTES)
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        memory = mmap.mmap(descriptor, size_bytes, flags=mmap.MAP_SHARED, prot=protection)
        self._words = memoryview(memory)[:16].cast("Q")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch knows no tensors which only can be read
            self._whole = torch.frombuffer(memory, dtype=torch.uint8)
        # All pages now: random rows of a table would be slow for a long time. Not by the system's MAP_POPULATE, for
        # which Python would stop all threads, also the one that shows that this process lives.
        self._whole[:: mmap.PAGESIZE].amax()
        self.tensors = {place.name: self._tensor(place) for place in places}

    @classmethod
    def new(cls, who: str, specs: Mapping[str, TensorSpec]) -> TensorRegion:
        """Memory for these tensors. Raises: WorkerError when there is too little."""
        places, size_bytes = layout(specs)
        return cls(allocate_bytes(who, size_bytes), places, writable=True)

    @property
    def word(self) -> int:
        """The version word."""
        found = self._words[0]
        order_memory()
        return found

    @word.setter
    def word(self, value: int) -> None:
        order_memory()
        self._words[0] = value
        order_memory()

    @property
    def limit(self) -> int:
        """The last version that may be read without asking."""
        return self._words[1]

    @limit.setter
    def limit(self, value: int) -> None:
        self._words[1] = value

    def forbid_writers(self) -> None:
        """Whoever maps the region from here on can only read it."""
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)

    def content(self) -> memoryview:
        """All bytes behind the version word."""
        return self._whole[_ALIGN_BYTES:].numpy().data

    def _tensor(self, place: Place) -> Tensor:
        if place.spec.size_bytes == 0:
            return torch.empty(place.spec.shape, dtype=place.spec.dtype)
        content = self._whole[place.offset : _end(place)]
        return content.view(place.spec.dtype).view(place.spec.shape)


def check_region(descriptor: int, places: Sequence[Place], who: str) -> None:
    """Whether a foreign region is large enough and stays so.

    Raises: WorkerError; the system would otherwise end whoever reads behind its end.
    """
    needed = max((_end(place) for place in places), default=_ALIGN_BYTES)
    seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    if os.fstat(descriptor).st_size < needed or not seals & fcntl.F_SEAL_SHRINK:
        raise WorkerError(f"{who} shares memory that is smaller than {needed:,} bytes, or could become so: refused.")


def _end(place: Place) -> int:
    return place.offset + place.spec.size_bytes


def to_json(places: Sequence[Place]) -> list[list[object]]:
    """Places as a message carries them."""
    return [[p.name, str(p.spec.dtype).removeprefix("torch."), list(p.spec.shape), p.offset] for p in places]


def from_json(found: Sequence[Sequence[object]]) -> tuple[Place, ...]:
    """The reverse of `to_json`."""
    return tuple(
        Place(str(name), TensorSpec(tuple(shape), getattr(torch, str(dtype))), int(offset))  # type: ignore[call-overload,arg-type]
        for name, dtype, shape, offset in found
    )
