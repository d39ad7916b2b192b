"""Kneser-Ney: probabilities that add up, the numbers of a small example by hand, and less for what is less likely."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.errors import DataError
from millrace.models.ngram import KneserNey

TEXTS = st.lists(st.integers(0, 3), min_size=4, max_size=40)


@settings(deadline=None)
@given(TEXTS, TEXTS, st.integers(1, 4))
def test_after_any_context_the_probabilities_add_up(known: list[int], context: list[int], order: int) -> None:
    model = KneserNey(known, order, 4)
    found = [model.probabilities([*context, token])[-1] for token in range(4)]
    assert sum(found) == pytest.approx(1)
    assert min(found) > 0


@settings(deadline=None)
@given(TEXTS, TEXTS, st.integers(1, 4))
def test_it_looks_at_no_more_than_its_order_and_never_ahead(known: list[int], text: list[int], order: int) -> None:
    model = KneserNey(known, order, 4)
    whole = model.probabilities(text)
    for place in range(len(text)):
        begin = max(0, place - order + 1)
        assert model.probabilities(text[begin : place + 1])[-1] == pytest.approx(whole[place])


def test_an_example_by_hand() -> None:
    # "abab": ab twice, ba once, so the discount of pairs is 1 / (1 + 2 · 1) = 1/3. Of single tokens it counts what they
    # follow: a follows b, b follows a; both once and nothing twice, so their discount is 1/2.
    model = KneserNey([0, 1, 0, 1], order=2, vocabulary=4)
    single = (1 - 0.5) / 2 + 0.5 * 2 / 2 * 0.25  # of a, and of b
    assert model.probabilities([1])[0] == pytest.approx(single)
    assert model.probabilities([2])[0] == pytest.approx(0.5 * 0.25)
    assert model.probabilities([0, 1])[1] == pytest.approx((2 - 1 / 3) / 2 + (1 / 3) * 1 / 2 * single)
    assert model.probabilities([0, 0])[1] == pytest.approx((1 / 3) * 1 / 2 * single)
    assert model.probabilities([2, 0])[1] == pytest.approx(single), "nothing is known of what follows 2"
    assert model.bits([0, 1]) == pytest.approx(-np.log2(model.probabilities([0, 1])).mean())


def test_longer_contexts_tell_more_of_a_text_that_repeats_itself() -> None:
    rng = np.random.default_rng(0)
    words = [rng.integers(0, 20, 6) for _ in range(30)]
    text = np.concatenate([words[n] for n in rng.integers(0, 30, 4000)])
    bits = [KneserNey(text[:20000], order, 20).bits(text[20000:]) for order in (1, 2, 3, 5)]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] > 4
    assert bits[-1] < 1.1  # log2(30) bits for every six tokens are the least there can be: 0.82


@pytest.mark.parametrize(
    ("tokens", "order", "vocabulary", "says"),
    [
        ([0, 1], 3, 4, "as many tokens"),
        ([0, 9], 1, 4, "from 0 to 9"),
        ([0.5], 1, 4, "whole numbers"),
        ([], 1, 4, "at least one"),
        ([0, 1], 0, 4, "order >= 1"),
        ([0, 1], 8, 256, "lower order"),
    ],
)
def test_what_cannot_be_counted_is_refused(tokens: list[float], order: int, vocabulary: int, says: str) -> None:
    with pytest.raises(DataError, match=says):
        KneserNey(tokens, order, vocabulary)
