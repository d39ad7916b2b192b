"""Sound from disk: WAV files, folders of spoken sentences, and changing the sample rate.

A recording is float32 [n], from -1 to 1, of one channel.
"""

from __future__ import annotations

import io
import math
import wave
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from millrace.data.split import holdout
from millrace.errors import DataError


@dataclass(frozen=True)
class SpokenSentences:
    """Recordings with what was said in them."""

    recordings: list[Tensor]  # each [n]: float32 from -1 to 1, or int16
    texts: list[str]  # in lower case, words separated by one space

    def __len__(self) -> int:
        return len(self.texts)

    def only(self, texts: Container[str]) -> SpokenSentences:
        """Those in which one of these texts is said."""
        chosen = [n for n, text in enumerate(self.texts) if text in texts]
        return SpokenSentences([self.recordings[n] for n in chosen], [self.texts[n] for n in chosen])


def read_wav(file: str | Path, rate_hz: int) -> Tensor:
    """A WAV file of whole numbers (8, 16, 24 or 32 bits), its channels averaged, at a sample rate of `rate_hz`.

    Raises:
        DataError: the file is missing, empty, or no such WAV file.
    """
    file = Path(file)
    if not file.is_file():
        raise DataError(f"There is no sound file {file}. Check the path.")
    return _decoded(str(file), str(file), rate_hz)


def write_wav(recording: Tensor, file: str | Path, rate_hz: int) -> None:
    """Write a recording, [n] from -1 to 1 (what is beyond is cut off), as 16-bit WAV."""
    samples = (recording.clamp(-1, 1) * 32767).round().to(torch.int16)
    with wave.open(str(file), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate_hz)
        out.writeframes(samples.numpy().astype("<i2").tobytes())


def resampled(recording: Tensor, from_hz: float, to_hz: float) -> Tensor:
    """A recording [n] at another sample rate: its spectrum, cut off or continued by zeros, [round(n · to / from)].

    Times are right to half a sample. Called with rates that are not the true ones, it changes speed and pitch together,
    as a tape does.
    """
    count = len(recording)
    wanted = max(1, round(count * to_hz / from_hz))
    if wanted == count:
        return recording
    # Zeros after the end: a spectrum is of something periodic, and the end would ring into the beginning. Lengths that
    # are multiples of 256 (at the lower rate) are quick to transform.
    unit = 256
    blocks = math.ceil((min(count, wanted) + unit) / unit)
    ratio = max(count, wanted) / min(count, wanted)
    small, large = blocks * unit, round(blocks * unit * ratio)
    size, other = (large, small) if count > wanted else (small, large)
    spectrum = torch.fft.rfft(recording, n=size)
    return torch.fft.irfft(spectrum[: other // 2 + 1], n=other)[:wanted] * (other / size)


def sentence_folder(directory: str | Path, rate_hz: int) -> SpokenSentences:
    """Read every `NAME.wav` of a folder, and what is said in it from `NAME.txt` beside it, in the order of names.

    Raises:
        DataError: the folder is missing or holds no such pair, a sentence lacks its text, or a file is unreadable.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"The folder {directory} does not exist. Give one with NAME.wav and NAME.txt, many times.")
    files = sorted(file for file in directory.iterdir() if file.suffix.lower() == ".wav")
    if not files:
        raise DataError(f"The folder {directory} holds no WAV files. Give one with NAME.wav and NAME.txt, many times.")
    texts = [_text_beside(file) for file in files]
    return SpokenSentences([read_wav(file, rate_hz) for file in files], texts)


def sentence_table(table: Any, rate_hz: int, name: str) -> SpokenSentences:
    """Read the columns "audio" and "text" (or "sentence", or "transcription") of a Hugging Face Dataset.

    Args:
        table: its audio not decoded (`cast_column("audio", Audio(decode=False))`): the bytes of WAV files.
        rate_hz: to read the recordings at.
        name: of the data set, for messages.

    Raises:
        DataError: a column is missing, or holds something else than WAV.
    """
    named = [column for column in ("text", "sentence", "transcription") if column in table.column_names]
    if "audio" not in table.column_names or not named:
        raise DataError(
            f"The data set {name} has the columns {', '.join(table.column_names)}, but one 'audio' and one 'text' (or "
            "'sentence', 'transcription') are needed. Rename them with .rename_column and save it, or choose another."
        )
    sentences = SpokenSentences([], [])
    for number, row in enumerate(table):
        sentences.recordings.append(_from_cell(row["audio"], f"row {number} of {name}", rate_hz))
        sentences.texts.append(plain_text(str(row[named[0]])))
    return sentences


def split_by_text(
    sentences: SpokenSentences, name: str, seed: int
) -> tuple[SpokenSentences, SpokenSentences, SpokenSentences]:
    """In three parts that share no text, for training, validation and the test: about 80 %, 10 % and 10 % of the texts.

    Args:
        sentences: to divide; those with one text stay together.
        name: of where they are from, for messages.
        seed: of the choice.

    Raises:
        DataError: there are fewer than ten texts.
    """
    texts = sorted(set(sentences.texts))
    if len(texts) < 10:
        raise DataError(f"{name} holds {len(texts)} different sentences, but at least 10 are needed. Add some.")
    rest, test = holdout(len(texts), 0.1, seed)
    inner = holdout(len(rest), 0.1, seed)
    parts = ({texts[n] for n in part.tolist()} for part in (rest[inner.train], rest[inner.held_out], test))
    train, validation, held_out = (sentences.only(part) for part in parts)
    return train, validation, held_out


def plain_text(text: str) -> str:
    """As it is to be recognized: lower case, no punctuation but apostrophes, one space between words."""
    kept = "".join(c if c.isalnum() or c == "'" else " " for c in text.lower().replace("\u2019", "'"))
    return " ".join(kept.split())


def _from_cell(cell: Mapping[str, Any], where: str, rate_hz: int) -> Tensor:
    if cell.get("bytes") is not None:
        return _decoded(io.BytesIO(cell["bytes"]), where, rate_hz)
    return read_wav(cell["path"], rate_hz)


def _text_beside(file: Path) -> str:
    try:
        text = plain_text(file.with_suffix(".txt").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"What is said in {file} should be in {file.with_suffix('.txt').name} beside it, as UTF-8 text, but that "
            f"cannot be read: {error}. Write it, or take the recording away."
        ) from error
    if not text:
        raise DataError(f"{file.with_suffix('.txt')} holds no words. Write what is said in {file.name}.")
    return text


def _decoded(source: str | IO[bytes], called: str, rate_hz: int) -> Tensor:
    try:
        with wave.open(source, "rb") as opened:
            channels, width, own_hz = opened.getnchannels(), opened.getsampwidth(), opened.getframerate()
            raw = opened.readframes(opened.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(
            f"The sound {called} cannot be read ({error or 'it ends early'}). Give WAV files of whole numbers, as "
            "ffmpeg -i FILE -c:a pcm_s16le FILE.wav makes them."
        ) from error
    samples = _samples(raw[: len(raw) // (channels * width) * channels * width], width)
    if not samples.size or own_hz <= 0:
        raise DataError(f"The sound {called} holds no samples. Give a whole recording.")
    mono = torch.from_numpy(samples.reshape(-1, channels).mean(1, dtype=np.float32))
    return resampled(mono, own_hz, rate_hz)


def _samples(raw: bytes, width: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """From -1 to 1; of one byte WAV has unsigned numbers, of more signed ones, the lowest byte first."""
    if width == 1:
        return (np.frombuffer(raw, np.uint8).astype(np.float32) - np.float32(128)) / np.float32(128)
    padded = np.zeros((len(raw) // width, 4), np.uint8)
    padded[:, 4 - width :] = np.frombuffer(raw, np.uint8).reshape(-1, width)
    return padded.view("<i4")[:, 0].astype(np.float32) / np.float32(2**31)
