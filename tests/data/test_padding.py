"""Padding: every row keeps its first tokens, and what is left is padding."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.data.padding import padded


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 2**40), max_size=7), max_size=5), st.integers(1, 6))
def test_rows_are_cut_or_filled(rows: list[list[int]], length: int) -> None:
    found = padded(rows, length, pad=-1)
    assert found.dtype == torch.int64
    assert found.shape == (len(rows), length)
    for row, tokens in zip(rows, found.tolist(), strict=True):
        assert tokens == (row + [-1] * length)[:length]
