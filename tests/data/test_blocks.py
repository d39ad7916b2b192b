"""Blocks: three parts that share no paragraph, are the whole text, and lie all over it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.data.blocks import blocks
from millrace.errors import DataError


@given(st.integers(20, 400), st.integers(1, 300))
def test_every_paragraph_is_in_one_part(count: int, words: int) -> None:
    paragraphs = [f"{number} {'word ' * (number % words)}é" for number in range(count)]
    try:
        parts = blocks(paragraphs)
    except DataError as error:
        assert "so long" in str(error)  # noqa: PT017  (it may or may not be refused)
        return
    lines = [bytes(part.tolist()).decode().splitlines() for part in parts]
    assert sorted(line for part in lines for line in part) == sorted(paragraphs)
    assert all(part == [p for p in paragraphs if p in set(part)] for part in lines), "in their order"


def test_a_twentieth_is_for_each_test_and_lies_all_over_a_long_text() -> None:
    paragraphs = [f"{number:09}" for number in range(200_000)]  # 2 MB
    train, validation, test = blocks(paragraphs)
    assert len(validation) == pytest.approx(100_000, rel=0.2)
    assert len(test) == pytest.approx(100_000, rel=0.2)
    assert len(train) + len(validation) + len(test) == 2_000_000
    numbers = [int(line) for line in bytes(test.tolist()).split()]
    assert sum(b - a > 1 for a, b in itertools.pairwise(numbers)) == 5  # blocks 20, 40, … 120 of 123


def test_short_texts_are_refused() -> None:
    with pytest.raises(DataError, match="at least 20"):
        blocks(["a paragraph"] * 19)
    with pytest.raises(DataError, match="empty lines"):
        blocks(["short"] * 20 + ["long " * 10_000])
