"""Speech in batches: what belongs together stays so, all batches are of one shape, and reading goes on bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from millrace.data.factory import Factory, Recipe
from millrace.data.noise import loudness
from millrace.data.speech import AtDecibels, SpeechBatches, speech_batches
from millrace.errors import DataError

TEXTS = [torch.arange(1, 2 + n) for n in range(5)]
CLEAN = [torch.full((100 + 10 * n,), float(n + 1)) for n in range(5)]


def every_tenth(recording: Tensor) -> Tensor:
    """Two features for ten samples."""
    return recording[::10, None].expand(-1, 2)


def batches(recordings: object = CLEAN, **changes: object) -> SpeechBatches:
    given = {"batch_size": 2, "seed": 0, **changes}
    return speech_batches(recordings, TEXTS, every_tenth, 20, **given)  # type: ignore[arg-type]


def test_recordings_stay_with_their_texts_and_padding_is_nothing() -> None:
    for batch in batches().until(epochs=2):
        assert batch["features"].shape == (2, 20, 2)
        assert batch["letters"].shape == (2, 5)
        for row in range(2):
            who = int(batch["features"][row, 0, 0]) - 1
            assert batch["frames"][row] == len(CLEAN[who]) // 10
            assert batch["lengths"][row] == len(TEXTS[who])
            assert batch["letters"][row, : who + 1].equal(TEXTS[who])
            assert not batch["letters"][row, who + 1 :].any()
            assert not batch["features"][row, batch["frames"][row] :].any()


def test_versions_share_a_text() -> None:
    versions = [recording for recording in CLEAN for _ in range(3)]
    seen = [
        (int(f), int(v), int(n))
        for batch in batches(versions, shuffle=False).one_pass()
        for f, v, n in zip(batch["features"][:, 0, 0], batch["version"], batch["lengths"], strict=True)
    ]
    assert seen == [(who + 1, version, who + 1) for who in range(5) for version in range(3)]


def test_a_factorys_stream_goes_on_bit_for_bit() -> None:
    def stream() -> SpeechBatches:
        noise = [torch.randn(150, generator=torch.Generator().manual_seed(n)) for n in range(5)]
        return batches(Factory(noise, 8000, Recipe(copies=4), seed=7))

    whole = [batch["features"] for batch in stream().until(batches=15)]
    first, second = stream(), stream()
    for _ in first.until(batches=6):
        pass
    second.seek(first.position())
    rest = [batch["features"] for batch in second.until(batches=15)]
    assert len(rest) == 9
    assert all(one.equal(other) for one, other in zip(whole[6:], rest, strict=True))


def test_too_long_recordings_and_misfits_are_refused() -> None:
    with pytest.raises(DataError, match="has 21 frames, but there is room for 20"):
        list(speech_batches([torch.ones(210)], TEXTS[:1], every_tenth, 20, batch_size=1).one_pass())
    with pytest.raises(DataError, match="7 recordings and 5 texts"):
        batches([*CLEAN, *CLEAN[:2]])
    with pytest.raises(DataError, match="0 texts"):
        speech_batches([], [], every_tenth, 20, batch_size=1)


def test_at_decibels_only_the_noise_changes_and_it_is_the_same_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    speech = [(torch.randn(4000, generator=generator) * 1000).to(torch.int16) for _ in range(3)]
    parts = AtDecibels(speech, 8000, [math.inf, 20.0, 0.0], ["car", "rain"], speech, seed=1)
    assert len(parts) == 9
    for number, clean in enumerate(speech):
        assert parts[3 * number].equal(clean.float())
        weak, strong = (parts[3 * number + version] - clean.float() for version in (1, 2))
        assert float(loudness(strong)) == pytest.approx(float(loudness(clean.float())), rel=1e-3)
        assert torch.allclose(strong, 10 * weak, atol=0.5)
    assert parts[5].equal(AtDecibels(speech, 8000, [math.inf, 20.0, 0.0], ["car", "rain"], speech, seed=1)[5])
    with pytest.raises(IndexError, match="9 was asked for"):
        parts[9]
