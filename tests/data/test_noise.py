"""Noises, rooms and mixing: what each is meant to be, heard by its spectrum; and the same generator, the same sound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from millrace.data.noise import NOISES, at_decibels, at_speed, crowd, in_room, loudness, room, shaped
from millrace.errors import DataError

RATE_HZ = 8000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tone(hz: float, seconds: float = 1.0) -> Tensor:
    return torch.sin(2 * torch.pi * hz * torch.arange(round(seconds * RATE_HZ)) / RATE_HZ)


def energy_below(sound: Tensor, hz: float) -> float:
    spectrum = torch.fft.rfft(sound).abs().square()
    return float(spectrum[: round(hz * len(sound) / RATE_HZ)].sum() / spectrum.sum())


def loudest_hz(sound: Tensor) -> float:
    return float(torch.fft.rfft(sound).abs().argmax()) * RATE_HZ / len(sound)


VOICES = [tone(500, 0.7), tone(1200, 0.5)]


@pytest.mark.parametrize("name", NOISES)
def test_a_noise_follows_from_its_generator_and_has_the_usual_loudness(name: str) -> None:
    make = NOISES[name]
    one, same, other = (make(9000, RATE_HZ, generator(seed), VOICES) for seed in (1, 1, 2))
    assert one.shape == (9000,)
    assert one.isfinite().all()
    assert one.equal(same)
    assert not one.equal(other)
    assert float(loudness(one)) == pytest.approx(1.0, rel=1e-4)


def test_a_car_rumbles_rain_hisses_and_a_crowd_says_what_others_say() -> None:
    count = 2 * RATE_HZ
    below = {name: energy_below(make(count, RATE_HZ, generator(3), VOICES), 300) for name, make in NOISES.items()}
    assert below["car"] > 0.8
    assert below["rain"] < 0.3
    babble = torch.fft.rfft(crowd(count, RATE_HZ, generator(), VOICES)).abs().square()
    near = sum(float(babble[2 * hz - 60 : 2 * hz + 60].sum()) for hz in (500, 1200))
    assert near > 0.9 * float(babble.sum())


def test_a_crowd_needs_people() -> None:
    for name in ("crowd", "restaurant"):
        with pytest.raises(DataError, match="needs utterances of other people"):
            NOISES[name](800, RATE_HZ, generator(), [])


def test_slopes_are_those_of_white_pink_and_brown_noise() -> None:
    def octaves(slope: float) -> float:
        """Energy of 1000 to 2000 Hz over that of 500 to 1000 Hz."""
        spectrum = torch.fft.rfft(shaped(8 * RATE_HZ, RATE_HZ, generator(), slope=slope)).abs().square()
        return float(spectrum[8000:16000].sum() / spectrum[4000:8000].sum())

    assert [octaves(slope) for slope in (0.0, 1.0, 2.0)] == pytest.approx([2.0, 1.0, 0.5], rel=0.1)


@settings(max_examples=20, deadline=None)
@given(st.floats(-20, 40), st.integers(0, 99), st.floats(0.01, 1000))
def test_speech_is_so_many_decibels_louder_than_the_noise(decibels: float, seed: int, loud: float) -> None:
    speech, noise = loud * tone(400, 0.2), torch.randn(1600, generator=generator(seed))
    added = at_decibels(speech, noise, decibels) - speech
    measured = 20 * torch.log10(loudness(speech) / loudness(added))
    assert float(measured) == pytest.approx(decibels, abs=0.05)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.5, 2.0))
def test_speed_changes_length_and_pitch_alike(speed: float) -> None:
    changed = at_speed(tone(600), speed)
    assert len(changed) == round(RATE_HZ / speed)
    assert loudest_hz(changed) == pytest.approx(600 * speed, abs=1.5 * speed)
    assert float(changed[200:-200].abs().max()) == pytest.approx(1.0, abs=0.05)


def test_a_room_is_the_click_itself_and_a_tail_that_dies_away_in_time() -> None:
    response = room(RATE_HZ, 0.4, generator(5))
    assert len(response) == round(0.4 * RATE_HZ)
    assert response[0] == 1.0
    assert response[1:8].abs().max() < 0.45  # a first echo, at most
    early, late = response[400:1200].square().mean(), response[2000:2800].square().mean()
    # 1600 samples further, 0.2 s, the tail is 30 dB weaker: half of 60 dB in half of the time.
    assert float(10 * torch.log10(early / late)) == pytest.approx(30, abs=3)


def test_in_a_room_is_the_convolution_cut_off_at_the_end() -> None:
    sound, response = torch.randn(2, 300, generator=generator(), dtype=torch.float64)
    by_hand = torch.stack([(sound[: n + 1].flip(0) * response[: n + 1]).sum() for n in range(300)])
    assert torch.allclose(in_room(sound, response), by_hand)
    click = torch.zeros(300, dtype=torch.float64)
    click[0] = 1
    assert torch.allclose(in_room(sound, click), sound)
