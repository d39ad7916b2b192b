"""Which tensors travel together: nothing is lost, nothing is mixed, and all ranks find the same."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from millrace.replicas.buckets import cut, divide

TENSORS = st.lists(st.tuples(st.integers(0, 300), st.sampled_from("ab")), max_size=40)
BUCKET_BYTES, ALONE_BYTES = 200, 90


@given(TENSORS)
def test_every_tensor_is_in_one_bucket_of_its_kind(tensors: list[tuple[int, str]]) -> None:
    sizes, kinds = [size for size, _ in tensors], [kind for _, kind in tensors]
    buckets = divide(sizes, kinds, BUCKET_BYTES, ALONE_BYTES)
    assert sorted(place for places in buckets for place in places) == [at for at, size in enumerate(sizes) if size]
    for places in buckets:
        assert list(places) == sorted(places)
        assert len({kinds[place] for place in places}) == 1
        if len(places) > 1:
            assert sum(sizes[place] for place in places) <= BUCKET_BYTES
            assert max(sizes[place] for place in places) < ALONE_BYTES
    assert [places[-1] for places in buckets] == sorted(places[-1] for places in buckets)


@given(TENSORS)
def test_there_are_no_more_buckets_than_needed(tensors: list[tuple[int, str]]) -> None:
    """Of one kind, only the last bucket of several tensors can have space for another small one."""
    sizes, kinds = [size for size, _ in tensors], [kind for _, kind in tensors]
    buckets = divide(sizes, kinds, BUCKET_BYTES, ALONE_BYTES)
    for kind in "ab":
        packed = [
            sum(sizes[place] for place in places)
            for places in buckets
            if kinds[places[0]] == kind and sizes[places[0]] < ALONE_BYTES
        ]
        assert all(filled > BUCKET_BYTES - ALONE_BYTES for filled in packed[:-1])


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 30))
def test_chunks_hold_all_elements_in_order(lengths: list[int], chunk: int) -> None:
    chunks = cut(lengths, chunk)
    placed = []
    for number, pieces in enumerate(chunks):
        filled = 0
        for piece in pieces:
            assert piece.at == filled
            filled += piece.length
            placed += [(piece.tensor, piece.start + at) for at in range(piece.length)]
        assert filled == chunk or (number == len(chunks) - 1 and 0 < filled < chunk)
    assert placed == [(place, at) for place, length in enumerate(lengths) for at in range(length)]


def test_small_ones_are_packed_and_large_ones_go_alone() -> None:
    #        0   1    2   3   4    5  6
    sizes = [60, 100, 60, 60, 250, 0, 60]
    assert divide(sizes, "aaaaaab", BUCKET_BYTES, ALONE_BYTES) == ((1,), (0, 2, 3), (4,), (6,))
    assert divide(sizes, "abaaaab", 120, ALONE_BYTES) == ((1,), (0, 2), (3,), (4,), (6,))
    assert divide([], []) == ()
