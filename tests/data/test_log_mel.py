"""Log-mel features against a plain numpy version, and what they say of tones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from millrace.data.log_mel import LogMel, SpeechFeatures, mel_filters
from millrace.errors import DataError


def by_numpy(samples: np.ndarray, rate_hz: int, bands: int, floor: float) -> np.ndarray:  # type: ignore[type-arg]
    """Frame by frame and band by band, as the definition says."""
    window, hop, size, low, high = round(0.025 * rate_hz), round(0.010 * rate_hz), 256, 60.0, rate_hz / 2
    mel = np.linspace(2595 * np.log10(1 + low / 700), 2595 * np.log10(1 + high / 700), bands + 2)
    corners = 700 * (10 ** (mel / 2595) - 1)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    frequencies = np.fft.rfftfreq(size, 1 / rate_hz)
    rows = []
    for start in range(0, len(samples) - window + 1, hop):
        energy = np.abs(np.fft.rfft(samples[start : start + window] * hann, size)) ** 2
        row = []
        for left, middle, right in zip(corners[:-2], corners[1:-1], corners[2:], strict=True):
            weights = np.interp(frequencies, [left, middle, right], [0, 1, 0], left=0, right=0)
            row.append(np.log((weights / weights.sum() * energy).sum() + floor))
        rows.append(row)
    return np.array(rows)


def test_the_features_are_what_the_definition_says() -> None:
    samples = np.random.default_rng(0).standard_normal(1234)
    module = LogMel(8000, bands=40, floor=1e-3)
    features = module(torch.from_numpy(samples).float())
    expected = by_numpy(samples, 8000, 40, 1e-3)
    assert features.shape == expected.shape == (module.frames(1234), 40)
    assert np.abs(features.numpy() - expected).max() < 1e-4


def test_a_batch_is_its_recordings_one_by_one_and_short_ones_have_no_frame() -> None:
    module = LogMel(8000)
    batch = torch.randn(2, 3, 900)
    assert torch.allclose(module(batch)[1, 2], module(batch[1, 2]), atol=1e-5)
    assert module.frames(199) == 0
    assert module.frames(200) == 1


def test_a_higher_tone_is_in_a_higher_band_and_silence_is_the_floor() -> None:
    module = LogMel(16000, bands=30, floor=1e-6)
    time_s = torch.arange(16000) / 16000
    loudest = [
        int(module(torch.sin(2 * torch.pi * hz * time_s)).mean(0).argmax()) for hz in (100, 400, 1000, 3000, 7000)
    ]
    assert loudest == sorted(set(loudest))
    assert torch.allclose(module(torch.zeros(1600)), torch.tensor(1e-6).log())


def test_white_noise_is_equally_loud_in_all_bands() -> None:
    features = LogMel(8000)(torch.randn(80_000, generator=torch.Generator().manual_seed(0)))
    assert float(features.exp().mean(0).log().std()) < 0.1


def test_bands_that_no_frequency_lies_in_are_refused() -> None:
    with pytest.raises(DataError, match="no frequency lies in band"):
        mel_filters(8000, 64, 60, 60, 4000)


def test_loudness_and_tone_do_not_count_in_speech() -> None:
    features = SpeechFeatures(8000, 40)
    sound = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(features(sound), features(100 * sound), atol=1e-4)
    assert float(features(sound).mean(0).abs().max()) < 1e-4
    assert features(sound[:200]).isfinite().all()
    with pytest.raises(DataError, match="150 samples is too short"):
        features(sound[:150])
