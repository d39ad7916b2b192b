"""Counting models of tokens: interpolated Kneser-Ney, what to measure a learned language model against.

Shape suffixes: N places in a text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from millrace.errors import DataError

Integers: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Level:
    """Counts of all sequences of n tokens, each written as one number with the vocabulary's size as its base."""

    grams: Integers  # sorted
    counts: Integers
    contexts: Integers  # the n - 1 tokens before the last, sorted, each once
    totals: Integers  # counts added up over all that follows a context
    kinds: Integers  # how many different tokens follow it
    discount: float


class KneserNey:
    """P(token | up to order - 1 tokens before it), counted once and asked often.

    A sequence's probability is its discounted count; what the discounts leave goes to the model with one token less of
    context, whose counts are not of how often a sequence occurs but of how many different tokens it follows. Under the
    lowest is the even distribution, so that nothing has probability 0.

    Source: Chen and Goodman, "An empirical study of smoothing techniques for language modeling", 1999, equations 23-25;
    one discount a level, n1 / (n1 + 2 n2) (Ney, Essen and Kneser, 1994).
    """

    def __init__(self, tokens: npt.ArrayLike, order: int, vocabulary: int) -> None:
        """Count.

        Args:
            tokens: [N], from 0 to vocabulary - 1.
            order: the longest sequences that are counted, in tokens.
            vocabulary: how many tokens there are.

        Raises:
            DataError: there are fewer tokens than `order`, one is outside of the vocabulary, or sequences of `order`
                tokens have no place in 63 bits.
        """
        self.order, self.vocabulary = order, vocabulary
        if order < 1 or vocabulary < 2 or vocabulary**order >= 2**63:
            raise DataError(
                f"An n-gram model needs order >= 1 and vocabulary >= 2 with vocabulary ** order < 2 ** 63, but got "
                f"order={order}, vocabulary={vocabulary}. Choose a lower order."
            )
        known = self._checked(tokens)
        if len(known) < order:
            raise DataError(f"An n-gram model of order {order} needs as many tokens, but got {len(known)}.")
        grams, counts = np.unique(_grams(known, order, vocabulary)[order - 1 :], return_counts=True)
        levels = [_level(grams, counts.astype(np.int64), vocabulary)]
        for length in range(order - 1, 0, -1):
            grams, follows = np.unique(levels[0].grams % vocabulary**length, return_counts=True)
            levels.insert(0, _level(grams, follows.astype(np.int64), vocabulary))
        self._levels = levels

    def probabilities(self, tokens: npt.ArrayLike) -> Floats:
        """P of every token after those before it in the same text, [N]; the first ones have less context.

        Raises:
            DataError: a token is outside of the vocabulary.
        """
        text = self._checked(tokens)
        found = np.full(len(text), 1.0 / self.vocabulary)
        for length, level in enumerate(self._levels, start=1):
            grams = _grams(text, length, self.vocabulary)
            contexts = grams // self.vocabulary
            total = _look_up(level.contexts, level.totals, contexts)
            known = (total > 0) & (np.arange(len(text)) >= length - 1)
            count = _look_up(level.grams, level.counts, grams)
            left = level.discount * _look_up(level.contexts, level.kinds, contexts)
            mixed = (np.maximum(count - level.discount, 0.0) + left * found) / np.maximum(total, 1)
            found = np.where(known, mixed, found)
        return found

    def bits(self, tokens: npt.ArrayLike) -> float:
        """The mean of -log2 P over a text: what an ideal coder would write for each of its tokens."""
        return float(-np.log2(self.probabilities(tokens)).mean())

    def _checked(self, tokens: npt.ArrayLike) -> Integers:
        found = np.asarray(tokens)
        if found.ndim != 1 or found.dtype.kind not in "iu" or not len(found):
            raise DataError(f"A text is whole numbers [N], at least one, but got {found.dtype} {list(found.shape)}.")
        found = found.astype(np.int64)
        if found.min() < 0 or found.max() >= self.vocabulary:
            raise DataError(
                f"Tokens must lie in 0 to {self.vocabulary - 1}, but these reach from {found.min()} to {found.max()}."
            )
        return found


def _grams(tokens: Integers, length: int, vocabulary: int) -> Integers:
    """For every place the `length` tokens that end there, as one number, [N]; the first length - 1 mean nothing."""
    found = np.zeros(len(tokens), np.int64)
    for back in range(min(length, len(tokens)) - 1, -1, -1):
        found[back:] = found[back:] * vocabulary + tokens[: len(tokens) - back]
    return found


def _level(grams: Integers, counts: Integers, vocabulary: int) -> _Level:
    contexts, first = np.unique(grams // vocabulary, return_index=True)
    totals = np.add.reduceat(counts, first)
    kinds = np.diff(np.append(first, len(grams)))
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    # Without sequences that occur once there would be no discount, and a probability of 0 for what was not seen.
    discount = once / (once + 2 * twice) if once and twice else 0.5
    return _Level(grams, counts, contexts, totals, kinds.astype(np.int64), discount)


def _look_up(keys: Integers, values: Integers, wanted: Integers) -> Integers:
    """The value of each key; 0 where it is not known."""
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    found: Integers = np.where(keys[place] == wanted, values[place], 0)
    return found
