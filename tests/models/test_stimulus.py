"""Optimal stimuli: where the answer is known, the climb finds it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from millrace.models.stimulus import optimal_stimulus, smooth_stimulus


def test_the_best_picture_for_a_filter_is_the_filter() -> None:
    torch.manual_seed(0)
    filter_ = torch.randn(1, 6, 6)
    filter_ -= filter_.mean()
    filter_ /= filter_.square().mean().sqrt()

    def unit(pictures: Tensor) -> Tensor:
        return (pictures * filter_).mean((1, 2, 3)).tanh()

    picture, values = optimal_stimulus(unit, torch.randn(3, 1, 6, 6))
    assert torch.allclose(picture, filter_, atol=0.02)
    assert values.shape == (3,)
    assert picture.mean().item() == pytest.approx(0, abs=1e-6)
    assert picture.square().mean().item() == pytest.approx(1, abs=1e-5)


def test_the_best_of_several_climbs_is_taken() -> None:
    """Energy has two peaks, one of them higher: which one is found depends on the start."""
    peak = torch.tensor([[[1.0, -1.0]]])

    def unit(pictures: Tensor) -> Tensor:
        along = (pictures * peak).sum((1, 2, 3))
        return torch.where(along > 0, along, -0.5 * along)

    starts = torch.stack([peak, -peak])
    picture, values = optimal_stimulus(unit, starts, steps=20)
    assert values.tolist() == pytest.approx([2.0, 1.0])
    assert torch.allclose(picture, peak)


def roughness(picture: Tensor) -> float:
    return float((picture[..., 1:] - picture[..., :-1]).square().mean())


def test_a_smooth_stimulus_drives_its_unit_with_less_noise() -> None:
    torch.manual_seed(0)
    wanted = torch.linspace(-1, 1, 12).expand(1, 12, 12) + 0.8 * torch.randn(1, 12, 12)

    def unit(pictures: Tensor) -> Tensor:
        return (pictures * wanted).mean((1, 2, 3))

    starts = torch.randn(2, 1, 12, 12)
    picture, rough = smooth_stimulus(unit, starts), optimal_stimulus(unit, starts)[0]
    assert picture.shape == (1, 12, 12)
    assert picture.mean().item() == pytest.approx(0, abs=1e-5)
    assert picture.square().mean().item() == pytest.approx(1, abs=1e-4)
    assert float(unit(picture[None])) > 0.3
    assert roughness(picture) < 0.9 * roughness(rough)
