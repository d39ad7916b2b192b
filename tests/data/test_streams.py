"""Streams: every row goes on where it ended, all of the text is read once an epoch, and a position is found again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.data.streams import StreamBatches, stream_batches
from millrace.errors import DataError

SIZES = st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(0, 4))  # streams, length, before


def streams(count: int, size: tuple[int, int, int], seed: int = 0) -> StreamBatches:
    return stream_batches(torch.arange(1, count + 1), *size, seed)


@settings(deadline=None)
@given(st.integers(60, 200), SIZES)
def test_a_row_goes_on_where_it_ended(count: int, size: tuple[int, int, int]) -> None:
    number, length, before = size
    found = list(streams(count, size).one_pass())
    assert {batch["inputs"].shape for batch in found} == {(number, before + length)}
    assert [bool(batch["fresh"].all()) for batch in found] == [window == 0 for window in range(len(found))]
    assert all(batch["fresh"].all() == batch["fresh"].any() for batch in found)
    read = torch.cat([batch["inputs"][:, before:] for batch in found], dim=1)
    assert read.diff(dim=1).eq(1).all(), "nothing is left out or read twice"
    assert read.shape[1] > count // number - 1 - length, "but for less than a window at the end"
    for batch in found:
        assert batch["targets"].equal(batch["inputs"][:, before:] + 1)
        assert batch["stream"].tolist() == list(range(number))
    first, second = found[0]["inputs"][:, :before], found[-1]["inputs"]
    assert first.eq(0).all()
    assert (len(found) - 1) * length < before or second.diff(dim=1).eq(1).all()


@settings(deadline=None)
@given(st.integers(60, 200), SIZES, st.integers(0, 9))
def test_a_position_is_found_again(count: int, size: tuple[int, int, int], taken: int) -> None:
    whole = [batch["inputs"] for batch in streams(count, size, seed=3).until(batches=taken + 4)]
    first, second = streams(count, size, seed=3), streams(count, size, seed=3)
    for _ in first.until(batches=taken):
        pass
    second.seek(first.position())
    assert all(a.equal(b["inputs"]) for a, b in zip(whole[taken:], second.until(batches=taken + 4), strict=True))


def test_epochs_begin_at_places_of_their_own_and_go_around_the_end() -> None:
    found = streams(1000, (2, 10, 0))
    epochs = [[batch["inputs"] for batch in found.until(epochs=epoch)] for epoch in (1, 2)]
    assert not epochs[0][0].equal(epochs[1][0])
    for epoch in epochs:
        assert len(epoch) == found.batches_per_epoch == 49
        assert len(torch.cat(epoch, 1).unique()) == 980


@settings(deadline=None)
@given(st.integers(60, 200), SIZES)
def test_values_of_tokens_are_found_at_their_targets(count: int, size: tuple[int, int, int]) -> None:
    batches = streams(count, size)
    targets = torch.cat([batch["targets"] for batch in batches.one_pass()], dim=1)
    assert batches.of_targets(batches.tokens).equal(targets)


@pytest.mark.parametrize(
    ("tokens", "size", "says"),
    [
        (torch.arange(20), (4, 5, 0), "at least 24"),
        (torch.zeros(20), (1, 5, 0), "whole-number"),
        (torch.zeros(2, 20, dtype=torch.int64), (1, 5, 0), "one sequence"),
        (torch.arange(20), (0, 5, 0), "streams=0"),
        (torch.arange(20), (1, 0, 0), "length=0"),
        (torch.arange(20), (1, 5, -1), "before=-1"),
    ],
)
def test_what_makes_no_streams_is_refused(tokens: torch.Tensor, size: tuple[int, int, int], says: str) -> None:
    with pytest.raises(DataError, match=says):
        stream_batches(tokens, *size)


def test_a_position_of_another_text_is_refused() -> None:
    with pytest.raises(DataError, match="tokens was 100 and is now 99"):
        streams(99, (2, 5, 0)).seek(streams(100, (2, 5, 0)).position())
