"""A batch in slices, and their results put together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import FeedError, SettingError
from millrace.graph.signature import TensorSpec
from millrace.replicas.slices import examples_in, sizes_of, whole_of


@given(st.integers(0, 200), st.integers(1, 40))
def test_slices_hold_every_example_once_and_are_as_equal_as_can_be(examples: int, replicas: int) -> None:
    sizes = sizes_of(examples, replicas)
    assert sum(sizes) == examples
    assert len(sizes) == min(examples, replicas)
    assert not sizes or (max(sizes) - min(sizes) <= 1 and min(sizes) >= 1)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 1000))
def test_the_mean_over_slices_is_the_mean_over_the_batch(sizes: list[int], seed: int) -> None:
    per_example = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    parts = per_example.split(sizes)
    scalar = TensorSpec((), torch.float64)
    mean = whole_of("loss", [part.mean() for part in parts], sizes, scalar, sum(sizes))
    torch.testing.assert_close(mean, per_example.mean(), rtol=1e-12, atol=1e-12)
    right = whole_of("right", [(part > 0).sum() for part in parts], sizes, TensorSpec((), torch.int64), sum(sizes))
    assert int(right) == int((per_example > 0).sum())
    joined = whole_of("scores", list(parts), sizes, TensorSpec.of(per_example), sum(sizes))
    assert torch.equal(joined, per_example)


def test_a_result_that_cannot_be_put_together_is_refused() -> None:
    with pytest.raises(SettingError, match=r"'pairs' was f32\[4, 4\] for a batch of 4 .* is f32\[2, 2\], f32\[2, 2\]"):
        whole_of("pairs", [torch.zeros(2, 2)] * 2, [2, 2], TensorSpec((4, 4), torch.float32), 4)


def test_feeds_of_different_lengths_are_refused() -> None:
    with pytest.raises(FeedError, match=r"images \[4, 2\], labels \[3\]"):
        examples_in([torch.zeros(4, 2), torch.zeros(3)], ["images", "labels"])
    with pytest.raises(FeedError, match="must have the batch as their first axis"):
        examples_in([torch.zeros(())], ["scale"])
    assert examples_in([torch.zeros(4, 2), torch.zeros(4)], ["images", "labels"]) == 4
