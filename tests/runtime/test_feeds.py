"""Batches become flat tensors in the order of the graph's feeds, or are refused with what was expected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from millrace.errors import FeedError
from millrace.graph.graph import Graph
from millrace.graph.trace import trace
from millrace.runtime.aliasing import Memory
from millrace.runtime.feeds import FeedReader

W = torch.ones(3)
X, Y = torch.arange(6.0).reshape(2, 3), torch.arange(2.0)


def _graph(feed: Any) -> Graph:
    def step(v: dict[str, Tensor], batch: Any) -> Tensor:
        return sum(leaf.sum() for leaf in pytree.tree_leaves(batch)) * v["w"].sum()

    return trace(step, {"w": W}, feed)


def _reader(feed: Any) -> FeedReader:
    return FeedReader(_graph(feed), Memory([]))


@pytest.mark.parametrize(
    ("traced", "given"),
    [
        ((X, Y), (X, Y)),
        ((X, Y), [X, Y]),
        ([X, Y], (X, Y)),
        ({"x": X, "y": Y}, {"y": Y, "x": X}),
        ({"x": (X,), "y": Y}, {"x": [X], "y": Y}),
        (X, X),
    ],
)
def test_the_same_names_are_the_same_batch(traced: Any, given: Any) -> None:
    reader = _reader(traced)
    batch = reader.read(given)
    expected = pytree.tree_leaves(traced)
    assert [a is b for a, b in zip(batch.placed, expected, strict=True)] == [True] * len(expected)
    assert batch.key == tuple((t.shape, t.dtype) for t in expected)
    assert pytree.tree_structure(reader.nest(batch)) == pytree.tree_structure(traced)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((X,), r"nests as \{0\}, but .* \{0, 1\}"),
        ((X, Y, Y), r"nests as \{0, 1, 2\}, but .* \{0, 1\}"),
        (X, r"nests as \{batch\}"),
        ({"x": X, "y": Y}, r"nests as \{x, y\}"),
        ((X, 3), r"'1': expected a tensor, got int"),
        ((X, None), r"nests as \{0\}|expected a tensor"),
    ],
)
def test_another_batch_is_refused(given: Any, message: str) -> None:
    with pytest.raises(FeedError, match=message):
        _reader((X, Y)).read(given)


def test_a_batch_that_lies_in_a_variable_is_copied() -> None:
    reader = FeedReader(_graph((W, Y)), Memory([W]))
    first, second = reader.read((W[:], Y)).placed
    assert first.data_ptr() != W.data_ptr()
    assert torch.equal(first, W)
    assert second is Y


def test_nothing_is_placed_where_feeds_are_not_read() -> None:
    batch = _reader((X, Y)).empty()
    assert batch.given == []
    assert [t.shape for t in batch.placed] == [X.shape, Y.shape]
