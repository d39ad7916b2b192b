"""Which tensors travel together: pure functions of their sizes, so that all ranks find the same without asking.

Many small tensors would each pay for a message of their own, and one large one would have to be there before the
first byte goes. So small ones are packed into buckets, and large ones go by themselves, from where they lie.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

BUCKET_BYTES = 25_000_000
ALONE_BYTES = 1_000_000  # quicker than 2 and 4 MB, in one run on a busy machine


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a tensor. tensor: its place in the list. start, length: elements of it. at: where they
    lie in the chunk."""

    tensor: int
    start: int
    length: int
    at: int


def divide(
    sizes_bytes: Sequence[int],
    kinds: Sequence[Hashable],
    bucket_bytes: int = BUCKET_BYTES,
    alone_bytes: int = ALONE_BYTES,
) -> tuple[tuple[int, ...], ...]:
    """Buckets of tensors of one kind each, in the order in which their last tensors come.

    Args:
        sizes_bytes: of the tensors, in the order in which they are made.
        kinds: what must not be mixed in a bucket, in practice the dtype.
        bucket_bytes: the most in a bucket of several tensors.
        alone_bytes: tensors of at least that size have buckets of their own.

    Returns: places of tensors in the list. Empty tensors are in no bucket.
    """
    done: list[tuple[int, ...]] = []
    filling: dict[Hashable, list[int]] = {}
    filled_bytes: dict[Hashable, int] = {}
    for place, (size_bytes, kind) in enumerate(zip(sizes_bytes, kinds, strict=True)):
        if size_bytes >= alone_bytes:
            done.append((place,))
        elif size_bytes:
            if filled_bytes.get(kind, 0) + size_bytes > bucket_bytes and kind in filling:
                done.append(tuple(filling.pop(kind)))
                filled_bytes[kind] = 0
            filling.setdefault(kind, []).append(place)
            filled_bytes[kind] = filled_bytes.get(kind, 0) + size_bytes
    done.extend(tuple(places) for places in filling.values())
    return tuple(sorted(done, key=lambda places: places[-1]))


def cut(lengths: Sequence[int], chunk: int) -> tuple[tuple[Piece, ...], ...]:
    """All elements of the tensors, one tensor after the other, in chunks of so many; only the last may be shorter.

    Args: lengths: elements of each tensor. chunk: elements.
    """
    chunks: list[list[Piece]] = []
    at = chunk  # there is none yet that has space
    for place, length in enumerate(lengths):
        start = 0
        while start < length:
            if at == chunk:
                chunks.append([])
                at = 0
            taken = min(length - start, chunk - at)
            chunks[-1].append(Piece(place, start, taken, at))
            start += taken
            at += taken
    return tuple(tuple(pieces) for pieces in chunks)
