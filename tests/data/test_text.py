"""Text streams."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from millrace.data import CharVocabulary, python_text, split_text, text_batches
from millrace.errors import DataError


def test_pythons_own_text_is_english_without_repetitions() -> None:
    text = python_text()
    assert len(text) > 250_000
    assert text.count(" the ") > 2_000
    assert len(set(text)) < 200
    paragraphs = [paragraph for paragraph in text.split("\n\n") if len(paragraph) > 40]
    assert len(set(paragraphs)) == len(paragraphs)
    assert text == python_text()


def test_a_python_without_help_texts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no help texts"):
        python_text()


@given(st.text(min_size=1))
def test_encoding_is_undone_by_decoding(text: str) -> None:
    vocabulary = CharVocabulary.of(text)
    tokens = vocabulary.encode(text)
    assert tokens.dtype == torch.int64
    assert vocabulary.decode(tokens) == text
    assert [vocabulary.characters[token] for token in tokens] == list(text)
    assert CharVocabulary.from_json(json.loads(json.dumps(vocabulary.to_json()))) == vocabulary
    assert len(vocabulary) == len(set(text))


@given(st.text(min_size=1), st.characters())
def test_unknown_characters_are_named(text: str, other: str) -> None:
    vocabulary = CharVocabulary.of(text)
    if other in text:
        assert vocabulary.decode(vocabulary.encode(other)) == other
    else:
        with pytest.raises(DataError, match=rf"\(at {len(text)} in the text\)"):
            vocabulary.encode(text + other)


def test_other_bad_vocabularies_and_tokens() -> None:
    with pytest.raises(DataError, match="each once"):
        CharVocabulary("ba")
    with pytest.raises(DataError, match="each once"):
        CharVocabulary.of("")
    with pytest.raises(DataError, match="'characters' as a string"):
        CharVocabulary.from_json({"characters": 3})
    for token in (-1, 2):
        with pytest.raises(DataError, match="must lie in 0 to 1"):
            CharVocabulary("ab").decode(torch.tensor([0, token]))


@given(st.text(alphabet="ab\n", min_size=2, max_size=300), st.floats(0.01, 0.99))
def test_a_split_text_is_whole_and_in_proportion(text: str, fraction: float) -> None:
    try:
        train, held_out = split_text(text, fraction)
    except DataError:
        assert len(text) * min(fraction, 1 - fraction) < 2 + len(text) / 50
        return
    assert train + held_out == text
    assert train
    assert held_out
    assert abs(len(held_out) - len(text) * fraction) <= len(text) / 50 + 2


def test_a_text_is_split_between_paragraphs() -> None:
    text = "\n\n".join(f"Paragraph {number}\nof two lines." for number in range(200))
    train, held_out = split_text(text, 0.2)
    assert train.endswith(".\n\n")
    assert held_out.startswith("Paragraph")
    with pytest.raises(DataError, match="leaves one part empty"):
        split_text(text, 0.0)


@given(st.integers(1, 4), st.integers(1, 7), st.integers(0, 60), st.integers(0, 3))
def test_windows_are_text_and_targets_are_one_further(batch_size: int, length: int, spare: int, seed: int) -> None:
    tokens = torch.arange((batch_size + 1) * length + spare)
    batches = text_batches(tokens, batch_size, length, seed)
    for epoch in (1, 2):
        read = list(batches.until(epochs=epoch))
        inputs = torch.cat([batch["inputs"] for batch in read])
        targets = torch.cat([batch["targets"] for batch in read])
        assert inputs.shape == targets.shape == (batch_size * len(read), length)
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(inputs - inputs[:, :1], torch.arange(length).expand_as(inputs))
        # No token twice in an epoch.
        assert len(set(inputs.flatten().tolist())) == inputs.numel()
    whole = torch.cat([batch["inputs"] for batch in batches.one_pass()]).flatten()
    assert torch.equal(whole, torch.arange(len(whole)))
    assert len(tokens) - len(whole) < 2 * length


def test_epochs_cut_at_different_offsets() -> None:
    batches = text_batches(torch.arange(1000), 8, 16)
    epochs = [list(batches.until(epochs=epoch)) for epoch in range(1, 11)]
    offsets = {int(epoch[0]["inputs"][0, 0]) % 16 for epoch in epochs}
    assert len(offsets) > 3


def test_strings_are_encoded() -> None:
    vocabulary = CharVocabulary("abc")
    batch = text_batches("ababababab", 1, 2, vocabulary=vocabulary).advance()
    assert set(vocabulary.decode(batch["inputs"].flatten())) == {"a", "b"}
    assert text_batches("xyxyxyxyxy", 1, 2).advance()["inputs"].max() == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "The text is empty"),
        ("abc", "has 3 tokens, but at least 8 are needed"),
        ("abcd" * 3, "fewer than one batch of batch_size=5"),
        (torch.zeros(99), "whole-number tokens"),
        (torch.zeros(9, 9, dtype=torch.int64), "one sequence"),
    ],
)
def test_bad_text(text: str | torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        text_batches(text, 5, 4)
