"""Subwords: a vocabulary of frequent pieces of words, learned from text, that can spell everything else.

Source: Sennrich, Haddow, Birch, "Neural machine translation of rare words with subword units", 2016; over bytes, so
that no text holds an unknown character (Radford et al., 2019).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

from millrace.data.batches import Json
from millrace.errors import DataError

PAD, START, END = 0, 1, 2
_SPECIAL = ["<pad>", "<s>", "</s>"]
_BYTES = 256


class Subwords:
    """A vocabulary, as `of` learns it or `from_json` gets it back."""

    def __init__(self, tokenizer: Any) -> None:
        """Args: tokenizer: a `tokenizers.Tokenizer` whose first three tokens are padding, start and end."""
        self._tokenizer = tokenizer

    @classmethod
    def of(cls, texts: Iterable[str], size: int, whole: Sequence[str] = ()) -> Subwords:
        """Learn the pieces of some texts.

        Args:
            texts: to learn from.
            size: tokens in all, at most: those for padding, start and end, `whole`, 256 bytes, and then pieces.
            whole: strings that are always one token, such as marks.

        Raises:
            DataError: the size has no room for all bytes.
        """
        least = len(_SPECIAL) + len(whole) + _BYTES
        if size < least:
            raise DataError(f"A vocabulary of subwords over bytes needs size >= {least}, but got size={size}.")
        library = _tokenizers()
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            show_progress=False,
            special_tokens=[*_SPECIAL, *whole],
            initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    @cached_property
    def _apart(self) -> frozenset[int]:
        return frozenset((PAD, START, END))

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without start and end."""
        return cast("list[int]", self._tokenizer.encode(text).ids)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of many texts, which is quicker than one by one."""
        return [encoded.ids for encoded in self._tokenizer.encode_batch(list(texts))]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, without padding, start and end."""
        kept = [token for token in tokens if token not in self._apart]
        return str(self._tokenizer.decode(kept, skip_special_tokens=False))

    def pieces(self, tokens: Iterable[int]) -> list[str]:
        """The text of every token by itself, as far as it is text."""
        return [self._tokenizer.decode([token], skip_special_tokens=False) for token in tokens]

    def to_json(self) -> dict[str, Json]:
        """As a JSON value for `from_json`."""
        return cast("dict[str, Json]", json.loads(self._tokenizer.to_str()))

    @classmethod
    def from_json(cls, value: Mapping[str, Json]) -> Subwords:
        """The vocabulary that `to_json` wrote.

        Raises:
            DataError: it is no vocabulary.
        """
        try:
            return cls(_tokenizers().Tokenizer.from_str(json.dumps(value)))
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"A saved vocabulary of subwords cannot be read: {error}.") from error


def _tokenizers() -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ImportError as error:
        raise DataError(
            f"Subwords need the package tokenizers, which cannot be imported ({error}). Install it with: "
            "pip install 'millrace[zoo]'"
        ) from error
