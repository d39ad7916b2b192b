"""Subwords: nothing is unknown, and a vocabulary is what its JSON says."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.data.subwords import END, PAD, START, Subwords
from millrace.errors import DataError

pytest.importorskip("tokenizers")
MARK = "\ue000"
TEXTS = ["the file was not found", "the file is open", "le fichier est ouvert"] * 3
VOCABULARY = Subwords.of(TEXTS, 300, [MARK])


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_can_be_spelled(text: str) -> None:
    tokens = VOCABULARY.encode(text)
    assert not {PAD, START, END} & set(tokens) or "<" in text
    assert VOCABULARY.decode([START, *tokens, END, PAD]) == text or "<" in text


def test_frequent_words_are_one_token_and_marks_always() -> None:
    assert len(VOCABULARY.encode("the file")) == 2
    assert VOCABULARY.pieces(VOCABULARY.encode(f"the{MARK}file"))[1] == MARK
    assert VOCABULARY.encode_all(TEXTS) == [VOCABULARY.encode(text) for text in TEXTS]
    assert len(VOCABULARY) <= 300


def test_json_keeps_all_of_it() -> None:
    again = Subwords.from_json(json.loads(json.dumps(VOCABULARY.to_json())))
    assert len(again) == len(VOCABULARY)
    text = f"un fichier {MARK} nouveau"
    assert again.encode(text) == VOCABULARY.encode(text)
    with pytest.raises(DataError, match="saved vocabulary"):
        Subwords.from_json({"model": 3})


def test_a_size_without_room_for_bytes_is_refused() -> None:
    with pytest.raises(DataError, match="size >= 260"):
        Subwords.of(TEXTS, 259, [MARK])
