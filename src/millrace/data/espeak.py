"""Speech made by espeak-ng, in many voices: said once, and kept in the cache directory."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from millrace.data.audio import resampled
from millrace.errors import DataError
from millrace.files import make_directory, replace_bytes, user_cache

Samples: TypeAlias = npt.NDArray[np.int16]
_CHILD = Path(__file__).with_name("espeak_child.py")
_FORMAT = 2  # of the files in the cache
_MOST_SECONDS = 600


@dataclass(frozen=True)
class Utterance:
    """What to say, and how."""

    text: str
    voice: str  # of espeak-ng, such as "en-us", with a variant: "en-us+f3"
    words_per_minute: int = 175
    pitch: int = 50  # 0 to 99


@dataclass(frozen=True)
class Espeak:
    """Where espeak-ng is installed."""

    library: Path  # libespeak-ng.so
    data: Path  # espeak-ng-data

    def variants(self) -> list[str]:
        """The names of the speakers that any language's voice can be given, as in "en-us+NAME"; sorted."""
        found = sorted(file.name for file in (self.data / "voices" / "!v").iterdir())
        return [name for name in found if " " not in name]


def spoken(utterances: Sequence[Utterance], espeak: Espeak, rate_hz: int) -> list[Tensor]:
    """What espeak-ng makes of the utterances: each int16 [n], full scale 32768, at a sample rate of `rate_hz`.

    The same list gives the same samples, everywhere the same version of espeak-ng is installed. They are kept in the
    cache directory, speech/; a cache that cannot be written does no harm.

    Raises:
        DataError: espeak-ng cannot be used or refuses a voice, or there are no words to say.
    """
    kept = user_cache() / "speech" / f"{_key(utterances, espeak, rate_hz)}.npz"
    _refuse_silence(utterances)
    try:
        with np.load(kept, allow_pickle=False) as content:
            samples, ends = content["samples"], content["ends"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        heard = [_at_rate(samples, own_hz, rate_hz) for samples, own_hz in _said(utterances, espeak)]
        samples, ends = np.concatenate(heard), np.cumsum([len(one) for one in heard])
        _keep(kept, samples, ends)
    return [torch.from_numpy(one) for one in np.split(samples, ends[:-1])]


def _refuse_silence(utterances: Sequence[Utterance]) -> None:
    for utterance in utterances:
        if not any(c.isalnum() for c in utterance.text):
            raise DataError(f"There are no words to say in {utterance.text!r}. Give espeak-ng some.")


def _key(utterances: Sequence[Utterance], espeak: Espeak, rate_hz: int) -> str:
    """Names the request and the version of espeak-ng (by the size of its library)."""
    asked = [_FORMAT, espeak.library.stat().st_size if espeak.library.exists() else 0, rate_hz]
    digest = hashlib.blake2b(json.dumps([asked, [astuple(one) for one in utterances]]).encode(), digest_size=12)
    return digest.hexdigest()


def _keep(file: Path, samples: Samples, ends: npt.NDArray[Any]) -> None:
    content = io.BytesIO()
    np.savez(content, samples=samples, ends=ends)
    try:
        make_directory(file.parent)
        replace_bytes(file, content.getvalue())
    except OSError:
        return  # it will be said again next time


def _said(utterances: Sequence[Utterance], espeak: Espeak) -> Iterator[tuple[Samples, int]]:
    """Samples and sample rate of each, from a process of espeak-ng's own (see `espeak_child`)."""
    asked = {
        "library": str(espeak.library),
        "data": str(espeak.data),
        "utterances": [astuple(one) for one in utterances],
    }
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(_CHILD)],
            input=json.dumps(asked).encode(),
            capture_output=True,
            timeout=_MOST_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"espeak-ng took more than {_MOST_SECONDS} s for {len(utterances)} utterances. Ask for fewer at a time."
        ) from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
        raise DataError(
            f"espeak-ng could not speak: {lines[-1]}. Check that {espeak.library} is its library and {espeak.data} its "
            "data (they come with the package espeakng-loader)."
        )
    (rate_hz,) = struct.unpack_from("=i", done.stdout)
    place = 4
    for _ in utterances:
        (count,) = struct.unpack_from("=i", done.stdout, place)
        yield np.frombuffer(done.stdout, np.int16, count, place + 4), rate_hz
        place += 4 + 2 * count


def _at_rate(samples: Samples, own_hz: int, rate_hz: int) -> Samples:
    recording = resampled(torch.from_numpy(samples.astype(np.float32)), own_hz, rate_hz)
    return recording.round().clamp(-32768, 32767).to(torch.int16).numpy()
