"""Batches of pairs: few shapes, every pair once, and a position to go on from."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.data.pairs import PairBatches, buckets_for
from millrace.errors import DataError

tokens = st.lists(st.integers(1, 9), min_size=1, max_size=12)
pairs_of = st.lists(st.tuples(tokens, tokens), min_size=8, max_size=40)


def read(batch: dict[str, object]) -> Counter[tuple[tuple[int, ...], tuple[int, ...]]]:
    rows = zip(batch["source"].tolist(), batch["target"].tolist(), strict=True)  # type: ignore[attr-defined]
    return Counter((tuple(t for t in s if t), tuple(t for t in u if t)) for s, u in rows)


@settings(max_examples=30, deadline=None)
@given(pairs_of, st.integers(1, 4))
def test_a_pass_has_every_pair_once_in_few_shapes(pairs: list[tuple[list[int], list[int]]], size: int) -> None:
    batches = PairBatches(pairs, size, buckets_for(pairs))
    found: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    shapes = set()
    for batch in batches.one_pass():
        found += read(batch)
        shapes.add((batch["source"].shape[1], batch["target"].shape[1]))
    assert found == Counter((tuple(s), tuple(t)) for s, t in pairs)
    assert len(shapes) <= 3


@settings(max_examples=30, deadline=None)
@given(pairs_of, st.integers(0, 9), st.integers(0, 5))
def test_an_epoch_has_no_pair_twice_and_goes_on_where_it_was(
    pairs: list[tuple[list[int], list[int]]], seed: int, stop: int
) -> None:
    pairs = [(s, [*t, 10 + number]) for number, (s, t) in enumerate(pairs)]  # all different
    make = lambda: PairBatches(pairs, 2, buckets_for(pairs), seed)  # noqa: E731
    whole = list(make().until(epochs=2))
    per_epoch = make().batches_per_epoch
    assert len(whole) == 2 * per_epoch
    assert {len(batch["source"]) for batch in whole} == {2}
    for epoch in (whole[:per_epoch], whole[per_epoch:]):
        counts = sum((read(batch) for batch in epoch), Counter())
        assert not counts or max(counts.values()) == 1
    first, second = make(), make()
    for _ in first.until(batches=stop):
        pass
    second.seek(first.position())
    rest = list(second.until(epochs=2))
    assert all(a["target"].equal(b["target"]) for a, b in zip(whole[stop:], rest, strict=True))


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(DataError, match="3 source tokens and 1 target tokens fits none"):
        PairBatches([([1, 2, 3], [1])], 1, [(2, 2)])
    with pytest.raises(DataError, match="too few of about one length"):
        PairBatches([([1], [1])], 2, [(2, 2)])
