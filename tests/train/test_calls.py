"""Batches that go to the session together: all of them, in order, and none with one of another form."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from hypothesis import given
from hypothesis import strategies as st

from millrace.train.calls import grouped, stretch

FORMS = (
    (torch.Size([2]), torch.float32),
    (torch.Size([3]), torch.float32),
    (torch.Size([2]), torch.float64),
)


@given(st.lists(st.integers(0, 2)), st.integers(1, 5), st.sets(st.integers(0, 30)))
def test_groups_are_of_one_form_and_end_where_something_falls_due(kinds: list[int], most: int, due: set[int]) -> None:
    batches = [torch.full(FORMS[kind][0], at, dtype=FORMS[kind][1]) for at, kind in enumerate(kinds)]
    handed_out = 0

    def reading() -> Iterator[torch.Tensor]:
        nonlocal handed_out
        for count, batch in enumerate(batches, 1):
            handed_out = count
            yield batch

    groups = list(grouped(reading(), most, lambda: handed_out in due))
    assert [batch for group in groups for batch in group] == batches
    ends = list(itertools.accumulate(map(len, groups)))
    assert due & set(range(1, len(batches) + 1)) <= set(ends)
    for group, end in zip(groups, ends, strict=True):
        assert 1 <= len(group) <= most
        assert len({(batch.shape, batch.dtype) for batch in group}) == 1
        another = end < len(kinds) and kinds[end] != kinds[end - 1]
        assert len(group) == most or end in due or end == len(kinds) or another, "no group ends without a reason"


@given(st.integers(1, 9), st.integers(1, 12))
def test_a_stretch_ends_with_the_batches_or_where_it_is_told(count: int, wanted: int) -> None:
    batches = iter(range(count))
    taken: list[int] = []
    for batch in stretch(next(batches), batches, lambda: len(taken) >= wanted):
        taken.append(batch)
    assert taken == list(range(min(count, wanted)))
    assert list(batches) == list(range(len(taken), count)), "what is not taken is not read"
