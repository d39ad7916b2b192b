"""Held-out indices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from millrace.data import holdout
from millrace.errors import DataError


@given(st.lists(st.integers(-2, 3), min_size=2, max_size=60), st.floats(0.01, 0.99), st.integers(0, 5), st.booleans())
def test_a_partition_in_proportion(labels: list[int], fraction: float, seed: int, stratify: bool) -> None:
    count = len(labels)
    wanted = round(count * fraction)
    assume(0 < wanted < count)
    given_labels = torch.tensor(labels)
    train, held_out = holdout(count, fraction, seed, given_labels if stratify else None)
    assert sorted(train.tolist() + held_out.tolist()) == list(range(count))
    assert len(held_out) == wanted
    assert held_out.tolist() == sorted(held_out.tolist())
    for label in set(labels) if stratify else ():
        share = labels.count(label) * wanted / count
        assert abs(int((given_labels[held_out] == label).sum()) - share) < 1
    again = holdout(count, fraction, seed, given_labels if stratify else None)
    assert torch.equal(again.held_out, held_out)


def test_seeds_choose_differently() -> None:
    assert not torch.equal(holdout(100, 0.2, 0).held_out, holdout(100, 0.2, 1).held_out)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 1.5, 0.01, float("nan")])
def test_an_empty_part_is_refused(fraction: float) -> None:
    with pytest.raises(DataError, match="leaves one of the two sets empty"):
        holdout(10, fraction)


def test_labels_must_match() -> None:
    with pytest.raises(DataError, match=r"one label per example, \[10\], but labels have shape \[9\]"):
        holdout(10, 0.5, labels=torch.zeros(9))
