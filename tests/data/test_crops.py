"""Crops: from inside the photo, and alike in brightness and contrast."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.data.crops import random_crops, standardized, visible
from millrace.errors import DataError


@settings(max_examples=20, deadline=None)
@given(st.integers(8, 60), st.integers(8, 60), st.integers(0, 1000))
def test_crops_lie_inside_the_photo(rows: int, cols: int, seed: int) -> None:
    photo = torch.stack([torch.arange(rows).float()[:, None].expand(rows, cols), torch.arange(cols).expand(rows, cols)])
    crops = random_crops(photo, 5, 8, torch.Generator().manual_seed(seed))
    assert crops.shape == (5, 2, 8, 8)
    assert crops.min() >= 0
    assert crops[:, 0].max() <= rows - 1
    assert crops[:, 1].max() <= cols - 1
    steps = crops[:, 0].diff(dim=1)  # how many of the photo's rows are one of the crop's: square windows alone
    assert torch.allclose(steps.mean((1, 2)), crops[:, 1].diff(dim=2).mean((1, 2)), atol=1e-4)


def test_crops_are_of_many_sizes_and_follow_from_the_generator() -> None:
    photo = torch.arange(200.0).expand(1, 200, 200)
    crops, again = (random_crops(photo, 50, 10, torch.Generator().manual_seed(3)) for _ in range(2))
    assert crops.equal(again)
    sizes = (crops[..., -1] - crops[..., 0]).mean((1, 2)) / 0.9
    assert sizes.min() < 15
    assert sizes.max() > 60
    assert sizes.max() <= 81


def test_a_photo_that_is_too_small_is_refused() -> None:
    with pytest.raises(DataError, match="do not fit into a photo of 30 by 9"):
        random_crops(torch.zeros(1, 30, 9), 1, 10, torch.Generator())


def test_neither_brightness_nor_contrast_is_left() -> None:
    images = torch.rand(4, 1, 9, 9)
    made = standardized(images)
    assert made.mean((1, 2, 3)).abs().max() < 1e-5
    assert torch.allclose(made.square().mean((1, 2, 3)), torch.ones(4), atol=1e-4)
    assert torch.allclose(made, standardized(images * 0.5 + 0.3), atol=1e-4)
    assert standardized(torch.full((1, 1, 9, 9), 0.4)).abs().max() < 1e-4


def test_what_is_shown_lies_from_0_to_1_and_every_pixel_becomes_a_square() -> None:
    images = standardized(torch.rand(2, 1, 5, 4, generator=torch.Generator().manual_seed(0)))
    found = visible(images, zoom=3)
    assert found.shape == (2, 1, 15, 12)
    assert 0 <= float(found.min()) < float(found.max()) <= 1
    assert found[..., ::3, ::3].equal(found[..., 2::3, 2::3])
    assert torch.allclose(standardized(visible(images)), images, atol=1e-4)
