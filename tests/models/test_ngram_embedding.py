"""Embeddings of short sequences: equal ones have equal features, and nothing comes from beyond."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import SettingError
from millrace.models.ngram_embedding import NgramEmbedding

TOKENS = st.lists(st.integers(0, 255), min_size=9, max_size=20)


def embedding(rows: int = 5000) -> NgramEmbedding:
    torch.manual_seed(0)
    return NgramEmbedding([2, 4], rows, width=3)


@given(TOKENS, TOKENS)
def test_features_are_of_the_last_tokens_alone(one: list[int], other: list[int]) -> None:
    end = [7, 8, 9, 10]
    found = [embedding()(torch.tensor([text + end]))[0, -1] for text in (one, other)]
    assert found[0].equal(found[1])


@given(TOKENS, st.integers(0, 254))
def test_a_token_has_a_part_in_its_sequences_alone(text: list[int], change: int) -> None:
    place = len(text) // 2
    changed = list(text)
    changed[place] = change if change < text[place] else change + 1
    module = embedding()
    differs = (module(torch.tensor([text])) != module(torch.tensor([changed])))[0]
    pairs, fours = differs[:, :3].any(1).nonzero()[:, 0], differs[:, 3:].any(1).nonzero()[:, 0]
    first = place - module.before
    assert set((pairs - first).tolist()) <= {0, 1}
    assert set((fours - first).tolist()) <= {0, 1, 2, 3}


def test_different_sequences_rarely_share_a_row() -> None:
    module = NgramEmbedding([3], rows=65536, width=1)
    text = torch.randint(256, (1, 5002), generator=torch.Generator().manual_seed(0))
    assert len(module(text).unique()) > 4700  # of 5000 in 65536 rows some 4815 are expected to be different


def test_the_features_of_a_window_are_those_of_the_whole() -> None:
    module, text = embedding(), torch.randint(256, (2, 30), generator=torch.Generator().manual_seed(1))
    whole = module(text)
    assert whole.shape == (2, 30 - module.before, 6)
    assert module(text[:, 10:]).equal(whole[:, 10:])


@pytest.mark.parametrize("wrong", [([], 5, 3), ([0, 2], 5, 3), ([2], 0, 3), ([2], 5, 0)])
def test_wrong_sizes_are_refused(wrong: tuple[list[int], int, int]) -> None:
    with pytest.raises(SettingError, match="n-gram embedding"):
        NgramEmbedding(*wrong)
