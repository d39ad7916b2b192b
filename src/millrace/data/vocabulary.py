"""Words of running text, and their numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from millrace.data.batches import Json
from millrace.errors import DataError, did_you_mean

Numbers: TypeAlias = npt.NDArray[np.int64]

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")


def words_of(text: str) -> list[str]:
    """The words of a text in small letters; digits and underscores end a word."""
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class WordVocabulary:
    """The words that are frequent enough, the most frequent first, and how often each occurs."""

    words: tuple[str, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, sentences: Sequence[Sequence[str]], least: int, most: int | None = None) -> WordVocabulary:
        """Of the words that occur at least `least` times, the `most` frequent ones.

        Raises: DataError: fewer than two words are left.
        """
        counted = Counter(word for sentence in sentences for word in sentence)
        kept = [(word, n) for word, n in sorted(counted.items(), key=lambda item: (-item[1], item[0])) if n >= least]
        if len(kept[:most]) < 2:
            raise DataError(
                f"Of {len(counted)} different words {len(kept)} occur {least} times or more, but at least two are "
                "needed. Give more text, or a lower min_count."
            )
        words, counts = zip(*kept[:most], strict=True)
        return cls(words, counts)

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def number(self) -> dict[str, int]:
        """Of every word."""
        return {word: number for number, word in enumerate(self.words)}

    def has(self, words: Sequence[str]) -> bool:
        """Whether all of them are known."""
        return all(word in self.number for word in words)

    def numbers(self, words: Sequence[str]) -> list[int]:
        """Of words that must all be known. Raises: DataError with the nearest ones."""
        for word in words:
            if word not in self.number:
                raise DataError(
                    f"The word {word!r} is not among the {len(self)} known. {did_you_mean(word, list(self.words))}"
                )
        return [self.number[word] for word in words]

    def encode(self, sentences: Sequence[Sequence[str]]) -> tuple[Numbers, Numbers]:
        """The known words of sentences one after the other, [n], and which sentence each is of, [n]."""
        numbers = [[self.number[word] for word in sentence if word in self.number] for sentence in sentences]
        lengths = [len(sentence) for sentence in numbers]
        flat = np.fromiter((number for sentence in numbers for number in sentence), np.int64, sum(lengths))
        return flat, np.repeat(np.arange(len(lengths)), lengths)

    def to_json(self) -> dict[str, Json]:
        """As a JSON value for `from_json`."""
        return {"words": list(self.words), "counts": list(self.counts)}

    @classmethod
    def from_json(cls, value: Mapping[str, Json]) -> WordVocabulary:
        """The vocabulary that `to_json` wrote. Raises: DataError for anything else."""
        words, counts = value.get("words"), value.get("counts")
        if not isinstance(words, list) or not isinstance(counts, list) or len(words) != len(counts):
            raise DataError("A saved vocabulary must hold 'words' and 'counts', lists of equal length.")
        return cls(tuple(map(str, words)), tuple(int(str(count)) for count in counts))
