"""Word errors: words over words, in all and under each condition, however they fall into batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import pytest
import torch
from torch import Tensor

from millrace.data.batches import Batches
from millrace.models.recognizer import Recognizer
from millrace.models.word_errors import word_errors

SAID = ["a b", "c", "a c b", "b"]
HEARD = ["a b", "a", "a b", "b b b"]  # right; one replaced; one left out; two put in
VERSION = [0, 1, 0, 1]


class Told:
    """Stands in for batches: each utterance's features name it."""

    def __init__(self, size: int) -> None:
        self._size = size

    def one_pass(self) -> Iterator[dict[str, Tensor]]:
        letters = torch.zeros(4, 5, dtype=torch.int64)
        for row, text in enumerate(SAID):
            letters[row, : len(text)] = torch.tensor([1 + "abc ".index(letter) for letter in text])
        whole = {
            "features": torch.arange(4.0)[:, None, None].expand(4, 6, 6),
            "frames": torch.full((4,), 6),
            "letters": letters,
            "version": torch.tensor(VERSION),
        }
        for rows in torch.arange(4).split(self._size):
            yield {name: part[rows] for name, part in whole.items()}


class Hearing(Recognizer):
    """Leaves the features as they are."""

    def heard(self, features_BFM: Tensor, frames: Tensor) -> list[Tensor]:
        return list(features_BFM)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_all_words_count_alike(size: int) -> None:
    model = Hearing("abc ", [], bands=6, stride=3, width=8, layers=1, dropout=0.0)
    batches = cast(Batches, Told(size))
    found = word_errors(model, lambda path: HEARD[int(path[0, 0])], batches, ["quiet", "loud"])
    assert found == pytest.approx({"word_error": 4 / 7, "word_error_quiet": 1 / 5, "word_error_loud": 3 / 2})
