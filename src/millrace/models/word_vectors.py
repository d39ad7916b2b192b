"""Words with their vectors, asked in words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from millrace.data.vocabulary import WordVocabulary
from millrace.errors import DataError
from millrace.models.vectors import nearest, principal
from millrace.models.word_map import word_map

_MINUS = "-\u2212\u2013"  # also as printers set it
_TERM = re.compile(rf"([{_MINUS}+]?)\s*([^{_MINUS}+\s]+)")


@dataclass(frozen=True)
class WordVectors:
    """vectors: [V, D], on the CPU, without gradients."""

    vocabulary: WordVocabulary
    vectors: Tensor

    def near(self, line: str, count: int) -> list[tuple[str, float]]:
        """The words nearest to a word, or to a sum of words such as "hotter - hot + big", with their cosines.

        Raises: DataError: it is no such sum, or a word is not known.
        """
        found = terms(line)
        numbers = torch.tensor([self.vocabulary.numbers(list(found))])
        units = functional.normalize(self.vectors[numbers[0]], dim=-1)
        wanted = torch.tensor(list(found.values())) @ units
        words, cosines = nearest(self.vectors, wanted[None], count, leave_out=numbers)
        near = zip(words[0].tolist(), cosines[0].tolist(), strict=True)
        return [(self.vocabulary.words[n], cosine) for n, cosine in near if n not in numbers[0]]

    def drawn(self, rows: Sequence[Sequence[str]]) -> Tensor:
        """A picture [3, rows, cols] of words along their two principal components. Each row has a colour, and its first
        word is joined with the others; a word that is in several has that of the first."""
        group: dict[str, int] = {}
        for number, row in enumerate(rows):
            for word in row:
                group.setdefault(word, number)
        place = {word: number for number, word in enumerate(group)}
        lines = [(place[row[0]], place[word]) for row in rows for word in row[1:]]
        vectors = functional.normalize(self.vectors[self.vocabulary.numbers(list(group))], dim=-1)
        return word_map(principal(vectors), list(group), list(group.values()), lines)


def terms(line: str) -> dict[str, float]:
    """The words of a sum, and how often each is in it: "hotter - hot + big" is {"hotter": 1, "hot": -1, "big": 1}.

    Raises: DataError: there is none.
    """
    found: dict[str, float] = {}
    for sign, word in _TERM.findall(line.lower()):
        found[word] = found.get(word, 0.0) + (-1.0 if sign and sign in _MINUS else 1.0)
    if not found:
        raise DataError(f"{line!r} is neither a word nor a sum of words such as hotter - hot + big.")
    return found
