"""Similarity by company, against a count by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from millrace.data.cooccurrence import similarities


def by_hand(words: list[int], sentences: list[int], size: int, window: int) -> np.ndarray:
    counts = np.zeros((size, size))
    for i, word in enumerate(words):
        for j, context in enumerate(words):
            if i != j and abs(i - j) <= window and sentences[i] == sentences[j]:
                counts[word, context] += 1
    power = counts.sum(0) ** 0.75
    rows = np.zeros_like(counts)
    for word, context in zip(*np.nonzero(counts), strict=True):
        share = counts[word, context] / counts[word].sum()
        rows[word, context] = max(0.0, math.log(share / (power[context] / power.sum())))
    return rows


def test_it_is_the_cosine_of_positive_mutual_information() -> None:
    random = np.random.default_rng(0)
    words, sentences = random.integers(7, size=200), np.arange(200) // 30
    pairs, alike = similarities(words, sentences, 7, window=2, most=7)
    rows = by_hand(words.tolist(), sentences.tolist(), 7, 2)
    assert len(pairs) == 21
    for (one, other), value in zip(pairs, alike, strict=True):
        cosine = rows[one] @ rows[other] / max(np.linalg.norm(rows[one]) * np.linalg.norm(rows[other]), 1e-12)
        assert value == pytest.approx(cosine, abs=1e-6)


def test_only_the_most_frequent_words_are_compared() -> None:
    words = np.array([3] * 5 + [1] * 4 + [0] * 2 + [2])
    pairs, _ = similarities(words, np.zeros_like(words), 5, window=1, most=3)
    assert {word for pair in pairs.tolist() for word in pair} == {0, 1, 3}
