"""Sound from disk: what was written is read again at any rate and width, folders in order, and bad files named."""

from __future__ import annotations

import wave
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from millrace.data.audio import (
    SpokenSentences,
    plain_text,
    read_wav,
    resampled,
    sentence_folder,
    sentence_table,
    split_by_text,
    write_wav,
)
from millrace.errors import DataError


def tone(hz: float, rate_hz: int, seconds: float = 0.5) -> Tensor:
    fade = torch.hann_window(round(seconds * rate_hz))
    return 0.5 * fade * torch.sin(2 * torch.pi * hz * torch.arange(len(fade)) / rate_hz)


@pytest.mark.parametrize("rate_hz", [8000, 16000])
def test_what_was_written_is_read_again(rate_hz: int, tmp_path: Path) -> None:
    recording = tone(440, 8000)
    write_wav(recording, tmp_path / "a.wav", 8000)
    again = read_wav(tmp_path / "a.wav", rate_hz)
    assert again.dtype == torch.float32
    assert torch.allclose(again, tone(440, rate_hz), atol=2e-3)


@pytest.mark.parametrize(("width", "error"), [(1, 2e-2), (2, 1e-4), (3, 1e-6), (4, 1e-6)])
def test_all_widths_are_read_and_channels_averaged(width: int, error: float, tmp_path: Path) -> None:
    left, right = tone(300, 8000).double(), tone(700, 8000).double()
    both = torch.stack([left, right], dim=1).flatten().numpy()
    if width == 1:
        raw = np.rint(both * 127 + 128).astype(np.uint8).tobytes()
    else:
        whole = np.rint(both * (2 ** (8 * width - 1) - 1)).astype("<i4")
        raw = whole.view(np.uint8).reshape(-1, 4)[:, :width].tobytes()
    with wave.open(str(tmp_path / "a.wav"), "wb") as out:
        out.setparams((2, width, 8000, 0, "NONE", ""))
        out.writeframes(raw)
    assert torch.allclose(read_wav(tmp_path / "a.wav", 8000).double(), (left + right) / 2, atol=error)


@settings(max_examples=15, deadline=None)
@given(st.integers(2000, 6000), st.floats(0.3, 3.0))
def test_resampling_keeps_what_both_rates_can_hold(count: int, ratio: float) -> None:
    hz = 0.05 * min(1.0, ratio)  # per sample of the first rate: well below half of both

    def sound(samples: int, hz: float) -> Tensor:
        fade = torch.hann_window(samples, dtype=torch.float64)
        return fade * torch.sin(2 * torch.pi * hz * torch.arange(samples))

    other = resampled(sound(count, hz), 1.0, ratio)
    assert len(other) == round(count * ratio)
    assert float((other - sound(len(other), hz / ratio)).abs().max()) < 0.2  # by half a sample late at the most


def test_a_tone_too_high_for_the_new_rate_is_gone() -> None:
    assert float(resampled(tone(7000, 22050), 22050, 8000).abs().max()) < 1e-3


def test_a_folder_is_read_in_order(tmp_path: Path) -> None:
    for name, text in (("b", "Seven, two — NINE!"), ("a", "Don’t  stop")):  # noqa: RUF001
        write_wav(tone(400, 8000), tmp_path / f"{name}.wav", 8000)
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "notes.md").write_text("no sound")
    sentences = sentence_folder(tmp_path, 8000)
    assert sentences.texts == ["don't stop", "seven two nine"]
    assert [len(recording) for recording in sentences.recordings] == [4000, 4000]
    only = sentences.only({"don't stop"})
    assert only.texts == ["don't stop"]
    assert len(only.recordings) == 1


def test_bad_folders_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        sentence_folder(tmp_path / "none", 8000)
    with pytest.raises(DataError, match="holds no WAV files"):
        sentence_folder(tmp_path, 8000)
    write_wav(tone(400, 8000), tmp_path / "a.wav", 8000)
    with pytest.raises(DataError, match=r"a\.txt beside it"):
        sentence_folder(tmp_path, 8000)
    (tmp_path / "a.txt").write_text("…")
    with pytest.raises(DataError, match="holds no words"):
        sentence_folder(tmp_path, 8000)
    with pytest.raises(DataError, match="no sound file"):
        read_wav(tmp_path / "b.wav", 8000)


@pytest.mark.parametrize("content", [b"", b"no sound at all", b"RIFF\x00\x00\x00\x00WAVE"])
def test_what_is_no_wav_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.wav cannot be read.*ffmpeg"):
        read_wav(tmp_path / "a.wav", 8000)


def test_a_wav_without_samples_and_one_cut_short(tmp_path: Path) -> None:
    write_wav(torch.zeros(0), tmp_path / "none.wav", 8000)
    with pytest.raises(DataError, match="holds no samples"):
        read_wav(tmp_path / "none.wav", 8000)
    write_wav(tone(400, 8000), tmp_path / "a.wav", 8000)
    whole = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(whole[:2001])
    assert torch.allclose(read_wav(tmp_path / "a.wav", 8000), tone(400, 8000)[: (2001 - 44) // 2], atol=1e-4)


def test_a_hugging_face_table_of_wav_bytes(tmp_path: Path) -> None:
    write_wav(tone(400, 16000), tmp_path / "a.wav", 16000)
    cells = [
        {"bytes": (tmp_path / "a.wav").read_bytes(), "path": None},
        {"bytes": None, "path": str(tmp_path / "a.wav")},
    ]
    table = datasets.Dataset.from_dict({"audio": cells, "sentence": ["Hello.", "You there"]})
    sentences = sentence_table(table, 8000, "greetings")
    assert sentences.texts == ["hello", "you there"]
    assert sentences.recordings[0].equal(sentences.recordings[1])
    with pytest.raises(DataError, match="greetings has the columns audio"):
        sentence_table(table.remove_columns("sentence"), 8000, "greetings")
    with pytest.raises(DataError, match="row 0 of greetings cannot be read"):
        sentence_table(
            datasets.Dataset.from_dict({"audio": [{"bytes": b"fLaC", "path": None}], "text": ["x"]}), 8000, "greetings"
        )


def test_plain_text() -> None:
    assert plain_text(" It's  5 O'CLOCK; é! ") == "it's 5 o'clock é"


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=10, max_size=80).filter(lambda found: len(set(found)) >= 10), st.integers()
)
def test_no_text_is_in_two_parts_and_all_are_in_one(numbers: list[int], seed: int) -> None:
    sentences = SpokenSentences([torch.tensor([n]) for n in range(len(numbers))], [f"say {n}" for n in numbers])
    parts = split_by_text(sentences, "it", seed)
    texts = [set(part.texts) for part in parts]
    assert all(texts)
    assert not texts[0] & texts[1] | texts[0] & texts[2] | texts[1] & texts[2]
    assert len(texts[0]) >= 0.75 * len(set(numbers))
    there = sorted(int(recording) for part in parts for recording in part.recordings)
    assert there == list(range(len(numbers)))
    for part in parts:
        for recording, text in zip(part.recordings, part.texts, strict=True):
            assert text == sentences.texts[int(recording)]


def test_too_few_texts_cannot_be_divided() -> None:
    with pytest.raises(DataError, match="it holds 9 different sentences, but at least 10"):
        split_by_text(SpokenSentences([torch.zeros(1)] * 18, [f"say {n}" for n in range(9)] * 2), "it", 0)
