"""A group whose ranks are processes of one host: they add up through memory that all of them have.

The memory is small, whatever is reduced: everything goes through it in rounds of a chunk each, which stay in the
processor's cache. A round has three parts. Every rank writes weight × its elements; adds up its share of them, over
the ranks in their order; and takes the whole sum. So all ranks have the same bits, also in every run.

    | words of rank 0 | words of rank 1 | …
    | slot 0: chunk of rank 0 | chunk of rank 1 | … | sum | slot 1: …

A rank's words say how many rounds it has written, summed and taken; nobody else writes them. A round may begin when
the one that had its slot is taken by all. So a rank that is dead or frozen keeps the others waiting, and nothing worse:
they stop when they are told to, and what it still writes is seen by nobody in the next generation.

The memory has no name, only the descriptor of rank 0, through which the others open it; that is closed when all have.
So the system takes the memory back when the last of these processes is gone, however that ended.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from millrace.errors import SettingError, WorkerError
from millrace.replicas.buckets import Piece, cut
from millrace.replicas.collective import Group
from millrace.replicas.rendezvous import StoreAddress
from millrace.runtime.transport.slots import order_memory

CHUNK_BYTES = 2 << 20
SLOTS = 4
SPIN_S = 100e-6
_LINE_BYTES = 64  # of words for each rank, so that their writes do not get in each other's way
_HERE, _WRITTEN, _SUMMED, _TAKEN = range(4)
_DOING = ("open the memory of rank 0", "write its part", "add up its share", "take the sum")
_KEY = "memory"


class SharedGroup(Group):
    """One rank's end. All-reduces are done in `wait`: there is nobody else on the host who would have time for them."""

    def __init__(
        self,
        store_address: StoreAddress,
        generation: int,
        rank: int,
        size: int,
        *,
        abandoned: Callable[[], bool],
        timeout_s: float,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """The group, once all ranks have come.

        Args:
            store_address: of the driver's `Rendezvous`.
            generation: no two groups at one store have the same.
            rank, size: this process's number in the group, and how many there are.
            abandoned: whether the driver has given this group up; asked during every wait.
            timeout_s: seconds for the others to come, and later for any wait: far above what a step takes.
            chunk_bytes: of a round, a multiple of 64, the same for all ranks.

        Raises:
            WorkerError: the others did not come, the group was abandoned before, the driver cannot be reached, or
                there is too little memory. SettingError: the system is not Linux.
        """
        super().__init__(generation, rank, size, abandoned, timeout_s)
        self._waiting: dict[int, tuple[tuple[Tensor, ...], float]] = {}
        self._memory: _Memory | None = None
        self._round = 0
        if size > 1:
            self._memory = self._meet(store_address, timeout_s, chunk_bytes)

    def _release(self) -> None:
        self._memory = None  # it is unmapped when the last view of it goes
        self._waiting.clear()

    def _meet(self, address: StoreAddress, timeout_s: float, chunk_bytes: int) -> _Memory:
        """Memory that all ranks have open. Rank 0's is used; the store says where it is."""
        what = f"the {self.size - 1} other rank(s) of generation {self.generation} at {address.host}:{address.port}"
        size_bytes = _Memory.size_bytes(self.size, chunk_bytes)
        descriptor = _allocate(self._patience.who, size_bytes) if self.rank == 0 else -1
        try:
            place = f"/proc/{os.getpid()}/fd/{descriptor} {os.fstat(descriptor).st_ino}" if self.rank == 0 else ""

            def tell_or_ask() -> str:
                store = address.connect(self.generation, timeout_s)
                if self.rank == 0:
                    store.set(_KEY, place)
                return bytes(store.get(_KEY)).decode()

            told = self._patience.call(tell_or_ask, what)
            if self.rank != 0:
                descriptor = _open(self._patience.who, told, size_bytes)
            memory = _Memory(descriptor, self.rank, self.size, chunk_bytes)
            memory.say(_HERE, 1)
            self._until(memory, _HERE, 1)  # rank 0 must not close it before
            return memory
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _begin(self, bucket_index: int, tensors: tuple[Tensor, ...], weight: float) -> None:
        self._waiting[bucket_index] = tensors, weight

    def _finish(self, bucket_indices: Sequence[int]) -> None:
        parts: dict[torch.dtype, list[_Part]] = {}
        for bucket_index in bucket_indices:
            tensors, weight = self._waiting.pop(bucket_index)
            for tensor in tensors:
                parts.setdefault(tensor.dtype, []).append(_Part(tensor, tensor.contiguous().view(-1), weight))
        rounds = [made for dtype, found in parts.items() for made in _rounds(dtype, found, self._open().chunk_bytes)]
        # While the others are late with one round there is something to do for the next.
        for step in range(len(rounds) + 2):
            if step < len(rounds):
                self._write(self._round + step, rounds[step])
            if 0 <= step - 1 < len(rounds):
                self._sum(self._round + step - 1, rounds[step - 1])
            if step - 2 >= 0:
                self._take(self._round + step - 2, rounds[step - 2])
        self._round += len(rounds)
        for part in (part for found in parts.values() for part in found):
            if part.flat.data_ptr() != part.tensor.data_ptr():
                part.tensor.copy_(part.flat.view(part.tensor.shape))

    def _write(self, number: int, made: _Round) -> None:
        memory = self._open()
        self._until(memory, _TAKEN, number + 1 - SLOTS)
        space = memory.chunk(number, self.rank, made.dtype)
        for part, piece in made.pieces:
            torch.mul(part.elements(piece), part.weight, out=space[piece.at : piece.at + piece.length])
        memory.say(_WRITTEN, number + 1)

    def _sum(self, number: int, made: _Round) -> None:
        """Add up this rank's share of the elements."""
        memory = self._open()
        self._until(memory, _WRITTEN, number + 1)
        share = slice(made.count * self.rank // self.size, made.count * (self.rank + 1) // self.size)
        chunks = [memory.chunk(number, rank, made.dtype)[share] for rank in range(self.size)]
        total = memory.total(number, made.dtype)[share]
        if made.dtype == torch.bfloat16:
            wide = chunks[0].float()
            for chunk in chunks[1:]:
                wide += chunk
            total.copy_(wide)
        else:
            torch.add(chunks[0], chunks[1], out=total)
            for chunk in chunks[2:]:
                total += chunk
        memory.say(_SUMMED, number + 1)

    def _take(self, number: int, made: _Round) -> None:
        memory = self._open()
        self._until(memory, _SUMMED, number + 1)
        total = memory.total(number, made.dtype)
        for part, piece in made.pieces:
            part.elements(piece).copy_(total[piece.at : piece.at + piece.length])
        memory.say(_TAKEN, number + 1)

    def _broadcast(self, tensors: Sequence[Tensor], source: int) -> None:
        memory = self._open()
        for made in _rounds(torch.uint8, [_Part(tensor, tensor, 1.0) for tensor in tensors], memory.chunk_bytes):
            number, total = self._round, memory.total(self._round, torch.uint8)
            if self.rank == source:
                self._until(memory, _TAKEN, number + 1 - SLOTS)
            else:
                self._until(memory, _WRITTEN, number + 1, [source])
            for part, piece in made.pieces:
                own, there = part.elements(piece), total[piece.at : piece.at + piece.length]
                (there if self.rank == source else own).copy_(own if self.rank == source else there)
            for word in (_WRITTEN, _SUMMED, _TAKEN):
                memory.say(word, number + 1)
            self._round += 1

    def _until(self, memory: _Memory, word: int, count: int, ranks: Sequence[int] | None = None) -> None:
        """Wait until these ranks (all by default) have said so much."""
        asked = range(self.size) if ranks is None else ranks
        self._patience.until(
            lambda: memory.have_said(asked, word, count),
            lambda: f"rank(s) {', '.join(map(str, memory.behind(asked, word, count)))} to {_DOING[word]}",
            SPIN_S,
        )

    def _open(self) -> _Memory:
        assert self._memory is not None  # a closed group has refused before
        return self._memory


@dataclass(frozen=True)
class _Part:
    """A tensor that is reduced. flat: its elements in a row; the tensor's own memory where that is so already."""

    tensor: Tensor
    flat: Tensor
    weight: float

    def elements(self, piece: Piece) -> Tensor:
        return self.flat[piece.start : piece.start + piece.length]


@dataclass(frozen=True)
class _Round:
    """What goes through the memory at a time. count: elements."""

    dtype: torch.dtype
    pieces: tuple[tuple[_Part, Piece], ...]

    @property
    def count(self) -> int:
        last = self.pieces[-1][1]
        return last.at + last.length


def _rounds(dtype: torch.dtype, parts: Sequence[_Part], chunk_bytes: int) -> list[_Round]:
    chunks = cut([part.flat.numel() for part in parts], chunk_bytes // dtype.itemsize)
    return [_Round(dtype, tuple((parts[piece.tensor], piece) for piece in pieces)) for pieces in chunks]


class _Memory:
    """What all ranks have mapped, as one of them sees it."""

    def __init__(self, descriptor: int, rank: int, size: int, chunk_bytes: int) -> None:
        self.chunk_bytes = chunk_bytes
        self._rank, self._size = rank, size
        mapped = mmap.mmap(
            descriptor, self.size_bytes(size, chunk_bytes), flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        )
        self._words = memoryview(mapped).cast("Q")
        slots = torch.frombuffer(mapped, dtype=torch.uint8, offset=_LINE_BYTES * size)
        self._slots = slots.view(SLOTS, size + 1, chunk_bytes)

    @staticmethod
    def size_bytes(size: int, chunk_bytes: int) -> int:
        return _LINE_BYTES * size + SLOTS * (size + 1) * chunk_bytes

    def chunk(self, number: int, rank: int, dtype: torch.dtype) -> Tensor:
        """What a rank writes in a round."""
        return self._slots[number % SLOTS, rank].view(dtype)

    def total(self, number: int, dtype: torch.dtype) -> Tensor:
        """What all ranks together make of it."""
        return self._slots[number % SLOTS, self._size].view(dtype)

    def say(self, word: int, count: int) -> None:
        order_memory()
        self._words[self._rank * _LINE_BYTES // 8 + word] = count

    def have_said(self, ranks: Sequence[int], word: int, count: int) -> bool:
        for rank in ranks:
            if self._words[rank * _LINE_BYTES // 8 + word] < count:
                return False
        order_memory()
        return True

    def behind(self, ranks: Sequence[int], word: int, count: int) -> list[int]:
        return [rank for rank in ranks if self._words[rank * _LINE_BYTES // 8 + word] < count]


def _allocate(who: str, size_bytes: int) -> int:
    if not hasattr(os, "memfd_create"):
        raise SettingError(f"{who}: shared memory between processes needs Linux. Pass transport='gloo'.")
    descriptor = os.memfd_create("millrace-group", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
        # A rank that made it smaller would end every process that reads it.
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError as error:
        os.close(descriptor)
        raise WorkerError(f"{who}: {size_bytes:,} bytes of shared memory could not be had: {error}.") from error
    return descriptor


def _open(who: str, told: str, size_bytes: int) -> int:
    """A descriptor of the memory of rank 0, which has told where it is: its path, and its inode number."""
    path, inode = told.split()
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise WorkerError(
            f"{who} cannot open the memory of rank 0, {path}: {error.strerror}. Either that process has ended, or it "
            "is not on the same host, of the same user and in the same container; then pass transport='gloo'."
        ) from error
    found = os.fstat(descriptor)
    if (found.st_ino, found.st_size) != (int(inode), size_bytes):
        os.close(descriptor)
        raise WorkerError(
            f"{who} found other memory than that of rank 0 at {path} ({found.st_size:,} bytes instead of "
            f"{size_bytes:,}). Ranks of one group must be on one host and have the same chunk_bytes; or pass "
            "transport='gloo'."
        )
    return descriptor
