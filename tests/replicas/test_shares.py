"""Slices of a step over the workers that are there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from millrace.replicas.shares import share_slices


@given(st.data(), st.integers(1, 40))
def test_every_slice_is_computed_once_and_nobody_has_two_more_than_another(data: st.DataObject, slices: int) -> None:
    seats = sorted(data.draw(st.sets(st.integers(0, slices - 1), min_size=1)))
    shares = share_slices(seats, slices)
    assert sorted(slice_ for share in shares for slice_ in share) == list(range(slices))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all(seat in share for seat, share in zip(seats, shares, strict=True))


def test_with_all_workers_each_has_its_own() -> None:
    assert share_slices(range(3), 3) == ((0,), (1,), (2,))


def test_the_slices_of_empty_seats_go_to_the_first() -> None:
    assert share_slices([1, 3], 5) == ((0, 1, 4), (2, 3))
