"""Optimal stimuli: where the answer is known, the climb finds it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from millrace.models.stimulus import optimal_stimulus


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
