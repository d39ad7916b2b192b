"""The data factory: every example follows from seed and index alone, whatever was asked for before."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from millrace.data.factory import Factory, Recipe, noisy
from millrace.data.noise import loudness
from millrace.errors import DataError

RATE_HZ = 8000
PLAIN = {"clean_share": 1.0, "room_share": 0.0, "speed": (1.0, 1.0), "volume_decibels": (0.0, 0.0)}


def clean(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4000 + 100 * n, generator=generator) * 3000).to(torch.int16) for n in range(count)]


def factory(seed: int = 0, **changes: object) -> Factory:
    return Factory(clean(), RATE_HZ, Recipe(**changes), seed)  # type: ignore[arg-type]


def test_n_recordings_become_ten_times_as_many_all_different() -> None:
    made = factory()
    assert len(made) == 40
    examples = list(made)
    assert len(examples) == 40
    assert len({example.numpy().tobytes() for example in examples}) == 40
    assert all(example.isfinite().all() for example in examples)


def test_an_example_is_the_same_in_any_order_and_in_another_factory() -> None:
    first, second = factory(seed=3), factory(seed=3)
    forward = [first[n] for n in range(12)]
    backward = [second[n] for n in reversed(range(12))][::-1]
    assert all(one.equal(other) for one, other in zip(forward, backward, strict=True))
    assert not factory(seed=4)[5].equal(first[5])


def test_versions_are_of_their_own_recording() -> None:
    made = Factory(clean(), RATE_HZ, Recipe(copies=3, **PLAIN))  # type: ignore[arg-type]
    for index, example in enumerate(made):
        original = clean()[index // 3].float()
        assert torch.allclose(example / loudness(example), original / loudness(original), atol=1e-5)


def test_shares_speeds_and_volumes_are_the_recipes() -> None:
    lengths = [len(example) / 4000 for example in factory(copies=50, clean_share=1.0, room_share=0.0)][:50]
    assert min(lengths) < 0.93
    assert max(lengths) > 1.07
    assert all(1 / 1.1 - 1e-3 <= length <= 1 / 0.9 + 1e-3 for length in lengths)
    volumes = [20 * math.log10(float(loudness(example)) / 0.1) for example in factory(copies=50)]
    assert -15.01 < min(volumes) < -12
    assert 2 < max(volumes) < 5.01
    as_recorded = factory(copies=50, **{**PLAIN, "clean_share": 0.3})
    same = sum(
        torch.allclose(example / loudness(example), clean()[n // 50].float() / loudness(clean()[n // 50].float()))
        for n, example in enumerate(as_recorded)
    )
    assert 0.2 < same / 200 < 0.4


def test_without_noise_speech_stays_as_it_is() -> None:
    speech = clean()[0].float()
    assert noisy(speech, "car", math.inf, RATE_HZ, torch.Generator(), []) is speech


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noises": ("cars",)}, "no noise 'cars'.*'car'"),
        ({"copies": 0}, "at least one copy"),
        ({"noises": ()}, "one noise"),
        ({"speed": (0.0, 1.0)}, "above 0"),
        ({"decibels": (10.0, 0.0)}, "in this order"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Recipe(**changes)  # type: ignore[arg-type]


def test_a_factory_knows_its_ends() -> None:
    with pytest.raises(DataError, match="no clean recordings"):
        Factory([], RATE_HZ)
    for index in (-1, 40):
        with pytest.raises(IndexError, match=f"asked for {index}"):
            factory()[index]
