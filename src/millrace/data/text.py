"""Text as a stream of characters: English that every Python carries, vocabularies, and windows to learn from."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from millrace.data.batches import Batch, Json
from millrace.data.indexed import IndexedBatches
from millrace.data.randomness import derived_seed
from millrace.errors import DataError


def python_text() -> str:
    """The language reference that Python's own help() shows: several hundred kB of English, in a fixed order.

    Topics repeat whole passages of each other; each paragraph is kept once, since a held-out part that repeats
    what was trained on would measure memory only.

    Raises:
        DataError: this Python was installed without its help texts.
    """
    try:
        topics = cast("Mapping[str, str]", importlib.import_module("pydoc_data.topics").topics)
    except ImportError as error:
        raise DataError(
            "This Python has no help texts (module pydoc_data), which are the text to learn from. Install the full "
            "standard library (on Debian: libpython3-stdlib), or give a text of your own."
        ) from error
    paragraphs: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in topics[name].replace("\r\n", "\n").split("\n\n"):
            words = " ".join(paragraph.split())
            if words:
                paragraphs.setdefault(words, paragraph.strip("\n"))
    return "\n\n".join(paragraphs.values()) + "\n"


@dataclass(frozen=True)
class CharVocabulary:
    """A one-to-one numbering of characters."""

    characters: str  # sorted by code point, each once; the index of a character is its token

    def __post_init__(self) -> None:
        if not self.characters or list(self.characters) != sorted(set(self.characters)):
            raise DataError(
                f"A vocabulary needs at least one character, each once and in the order of code points, but got "
                f"{self.characters[:40]!r}. Build it with CharVocabulary.of(text)."
            )

    @classmethod
    def of(cls, text: str) -> CharVocabulary:
        """The characters that occur in a text (pass all of it, also what will be held out)."""
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.characters)

    @cached_property
    def _code_points(self) -> npt.NDArray[np.uint32]:
        return _code_points(self.characters)

    def encode(self, text: str) -> Tensor:
        """The tokens of a text, int64 [len(text)].

        Raises:
            DataError: a character is not in the vocabulary.
        """
        wanted = _code_points(text)
        tokens = np.searchsorted(self._code_points, wanted).clip(max=len(self) - 1)
        unknown = np.flatnonzero(self._code_points[tokens] != wanted)
        if unknown.size:
            place = int(unknown[0])
            raise DataError(
                f"The character {text[place]!r} (at {place} in the text) is not among the {len(self)} that the "
                f"vocabulary has: {self.characters!r}. Leave it out, or build the vocabulary from all texts together."
            )
        return torch.from_numpy(tokens.astype(np.int64))

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens [n].

        Raises:
            DataError: a token is outside the vocabulary.
        """
        numbers = tokens.tolist()
        if any(not 0 <= number < len(self) for number in numbers):
            raise DataError(
                f"Tokens must lie in 0 to {len(self) - 1}, but these reach from {min(numbers)} to {max(numbers)}. "
                "Decode with the vocabulary that the text was encoded with."
            )
        return "".join(self.characters[number] for number in numbers)

    def to_json(self) -> dict[str, Json]:
        """As a JSON value for `from_json`."""
        return {"characters": self.characters}

    @classmethod
    def from_json(cls, value: Mapping[str, Json]) -> CharVocabulary:
        """The vocabulary that `to_json` wrote."""
        characters = value.get("characters")
        if not isinstance(characters, str):
            raise DataError(f"A saved vocabulary must hold 'characters' as a string, but this one has {characters!r}.")
        return cls(characters)


def split_text(text: str, fraction: float) -> tuple[str, str]:
    """A text in two: the first part to train on, and about the last `fraction` of it to hold out.

    The cut is at the end of a paragraph, or else of a line, near that place, so that neither part begins in the
    middle of a sentence; together they are the whole text.

    Raises:
        DataError: one of the parts would be empty.
    """
    wanted = len(text) - round(len(text) * fraction) if 0 < fraction < 1 else 0
    slack = max(1, len(text) // 50)
    cut = wanted
    for mark in ("\n\n", "\n"):
        found = text.rfind(mark, max(0, wanted - slack), wanted)
        if found > 0:
            cut = found + len(mark)
            break
    if not 0 < cut < len(text):
        raise DataError(
            f"Holding out fraction={fraction!r} of a text of {len(text)} characters leaves one part empty. Choose a "
            "fraction between 0 and 1, or a longer text."
        )
    return text[:cut], text[cut:]


class TextBatches(IndexedBatches):
    """Windows of a token sequence with the tokens that follow each; see `text_batches`."""

    draws_global_random = False

    def __init__(self, tokens: Tensor, batch_size: int, length: int, seed: int) -> None:
        if tokens.ndim != 1 or tokens.is_floating_point() or length < 1:
            raise DataError(
                f"Text must be one sequence of whole-number tokens, [n], cut into windows of length 1 or more, but "
                f"got {tokens.dtype} {list(tokens.shape)} and length={length!r}. Encode it with CharVocabulary."
            )
        # Each epoch shifts its windows by up to length - 1, so that every token is learned in many contexts.
        count = (len(tokens) - length) // length
        if count < 1:
            raise DataError(
                f"The text has {len(tokens)} tokens, but at least {2 * length} are needed for windows of "
                f"length={length}. Give more text, or shorter windows."
            )
        super().__init__("the text", count, batch_size, shuffle=True, seed=seed, drop_last=True)
        self._tokens = tokens.to(torch.int64)
        self._length = length
        self._identity |= {"tokens": len(tokens), "length": length}

    def _fetch(self, indices: Tensor, epoch: int | None, number: int) -> Batch:
        offset = 0 if epoch is None else derived_seed("offset", self.seed, epoch) % self._length
        starts = indices * self._length + offset
        windows = self._tokens[starts[:, None] + torch.arange(self._length + 1)]  # [B, length + 1]
        return {"inputs": windows[:, :-1].contiguous(), "targets": windows[:, 1:].contiguous()}


def text_batches(
    text: str | Tensor, batch_size: int, length: int, seed: int = 0, vocabulary: CharVocabulary | None = None
) -> TextBatches:
    """An endless stream of windows {"inputs": [B, L], "targets": [B, L]}, both int64; targets are one token further.

    An epoch goes through the text once, in windows that do not overlap, shuffled, at an offset of its own.

    Args:
        text: tokens [n], or a string.
        batch_size: windows per batch, B.
        length: tokens per window, L.
        seed: of order and offsets.
        vocabulary: for a string: how it is encoded; its own characters unless given.

    Raises:
        DataError: the text is too short for one batch, or holds a character that the vocabulary lacks.
    """
    if isinstance(text, str):
        if not text:
            raise DataError("The text is empty: there must be at least two windows of it. Check where it was read.")
        text = (vocabulary or CharVocabulary.of(text)).encode(text)
    return TextBatches(text, batch_size, length, seed)


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)
