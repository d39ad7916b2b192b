"""Which worker computes which slices of a step."""

from __future__ import annotations

from collections.abc import Sequence


def share_slices(seats: Sequence[int], slices: int) -> tuple[tuple[int, ...], ...]:
    """The slices of each of the workers that sit on `seats`.

    A worker has the slice of its own seat's number; those of empty seats are dealt out one by one from the first
    worker on, so that nobody has two more than another.

    Args: seats: ascending, each in 0..slices-1; at least one. slices: how many there are.
    """
    shares = [[seat] for seat in seats]
    for turn, slice_ in enumerate(sorted(set(range(slices)) - set(seats))):
        shares[turn % len(shares)].append(slice_)
    return tuple(tuple(sorted(share)) for share in shares)
