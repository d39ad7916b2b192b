"""Augmentations, checked against doing it slowly, one image and pixel at a time."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.test_batches import all_same, take
from torch import Tensor

from millrace.data import (
    as_batches,
    compose,
    mapped,
    on_images,
    random_affine,
    random_colour,
    random_crop,
    random_erasing,
    random_flip,
    random_resized_crop,
    random_shift,
)
from millrace.errors import DataError

shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 7), st.integers(1, 7))
EVERY = [
    random_shift,
    partial(random_crop, rows=4, cols=4, padding=1),
    random_flip,
    random_affine,
    partial(random_resized_crop, rows=5, cols=4),
    partial(random_erasing, probability=1.0),
]


def images(shape: tuple[int, ...]) -> Tensor:
    """Every pixel another value, none 0."""
    return torch.arange(1, 1 + math.prod(shape), dtype=torch.float32).view(shape)


@pytest.mark.parametrize("function", EVERY)
def test_the_seed_alone_decides_and_images_choose_for_themselves(function: Any) -> None:
    same_image = images((1, 2, 6, 6)).expand(16, 2, 6, 6).contiguous()
    before = same_image.clone()
    state = torch.get_rng_state()
    result = function(same_image, 3)
    assert torch.equal(result, function(same_image, torch.Generator().manual_seed(3)))
    assert not torch.equal(result, function(same_image, 4))
    assert len({tuple(image.flatten().tolist()) for image in result}) > 1
    assert torch.equal(same_image, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert result.dtype == torch.float32
    for channel_of in result.unbind(0):  # channels move together
        assert torch.equal(channel_of[0] != 0, channel_of[1] != 0)


@given(shapes, st.integers(0, 3), st.integers(0, 9))
def test_a_shift_is_one_of_the_allowed_shifts(shape: tuple[int, ...], most: int, seed: int) -> None:
    batch = images(shape)
    result = random_shift(batch, seed, most)
    assert result.shape == batch.shape
    padded = torch.nn.functional.pad(batch, (most, most, most, most))
    height, width = shape[2:]
    offsets = [(row, col) for row in range(2 * most + 1) for col in range(2 * most + 1)]
    for image, around in zip(result, padded, strict=True):
        assert any(torch.equal(image, around[:, r : r + height, c : c + width]) for r, c in offsets)


def test_all_shifts_occur() -> None:
    single = torch.zeros(400, 1, 5, 5)
    single[:, :, 2, 2] = 1
    places = random_shift(single, 0, 2).flatten(1).argmax(1)
    assert len(set(places.tolist())) == 25


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2), st.integers(0, 9))
def test_a_crop_is_a_window(rows: int, cols: int, padding: int, seed: int) -> None:
    batch = images((3, 2, 4, 5))
    spare_rows, spare_cols = 4 + 2 * padding - rows, 5 + 2 * padding - cols
    if min(spare_rows, spare_cols) < 0:
        with pytest.raises(DataError, match="does not fit"):
            random_crop(batch, seed, rows, cols, padding)
        return
    padded = torch.nn.functional.pad(batch, (padding,) * 4)
    for image, around in zip(random_crop(batch, seed, rows, cols, padding), padded, strict=True):
        windows = around.unfold(1, rows, 1).unfold(2, cols, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        assert any(torch.equal(image, window) for window in windows)


@given(shapes, st.integers(0, 9))
def test_a_flip_mirrors_or_keeps(shape: tuple[int, ...], seed: int) -> None:
    batch = images(shape)
    for image, original in zip(random_flip(batch, seed), batch, strict=True):
        assert torch.equal(image, original) or torch.equal(image, original.flip(-1))
    assert torch.equal(random_flip(batch, seed, 0.0), batch)
    assert torch.equal(random_flip(batch, seed, 1.0), batch.flip(-1))


@settings(deadline=None)
@given(shapes, st.integers(0, 9))
def test_a_resized_crop_of_everything_is_the_image(shape: tuple[int, ...], seed: int) -> None:
    batch = images(shape)
    result = random_resized_crop(batch, seed, shape[2], shape[3], least_area=1.0, max_stretch=1.0)
    assert torch.allclose(result, batch, rtol=1e-4)


def test_resized_crops_have_the_areas_and_proportions_asked_for_and_lie_within_the_image() -> None:
    rows, cols = torch.meshgrid(torch.linspace(0, 1, 80), torch.linspace(0, 1, 40), indexing="ij")
    batch = torch.stack([rows, cols]).expand(500, 2, 80, 40)
    result = random_resized_crop(batch, 0, 20, 10, least_area=0.2, max_stretch=1.5)
    assert result.shape == (500, 2, 20, 10)
    high = (result[:, 0, -1, 0] - result[:, 0, 0, 0]) * 20 / 19  # from the first row's centre to the last one's
    wide = (result[:, 1, 0, -1] - result[:, 1, 0, 0]) * 10 / 9
    area, stretch = high * wide, high / wide
    assert 0.19 < area.min() < 0.24
    assert 0.9 < area.max() < 1.04  # the last pixels' centres are 1, so their edges lie a little beyond
    assert 1.4 < stretch.max() < 1.56
    assert 1 / 1.56 < stretch.min() < 1 / 1.4
    assert result.min() >= 0
    assert result.max() <= 1
    for edge in (result[:, 0, 0, 0], 1 - result[:, 0, -1, 0], result[:, 1, 0, 0], 1 - result[:, 1, 0, -1]):
        assert edge.min() < 0.05  # windows reach every side


@pytest.mark.parametrize("bad", [{"rows": 0}, {"least_area": 0.0}, {"max_stretch": 0.5}])
def test_windows_that_cannot_be_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(DataError, match="window cannot be scaled"):
        random_resized_crop(images((1, 1, 4, 4)), 0, **{"rows": 2, "cols": 2, **bad})  # type: ignore[arg-type]


def test_colours_change_within_their_bounds_one_by_one() -> None:
    batch = torch.tensor([0.3, 0.4, 0.5])[None, :, None, None].expand(300, 3, 2, 2).clone()
    batch[..., 0] -= 0.1  # so that there is some contrast
    bright = random_colour(batch, 0, 0.5, 0.0, 0.0)
    factors = (bright / batch).flatten(1)
    assert torch.allclose(factors, factors[:, :1].expand_as(factors), rtol=1e-4)
    assert 1.4 < factors.max() <= 1.5001
    assert 1 / 1.5001 <= factors.min() < 1 / 1.4
    for contrast, saturation in ((0.5, 0.0), (0.0, 0.5)):
        changed = random_colour(batch, 0, 0.0, contrast, saturation)
        assert torch.allclose(changed.mean((1, 2, 3)), batch.mean((1, 2, 3)), atol=1e-5)
        grey = batch.mean(1, keepdim=True)
        kept = changed.mean(1, keepdim=True) if saturation else changed - changed.mean(1, keepdim=True)
        assert torch.allclose(kept, grey.expand_as(kept), atol=1e-5) == bool(saturation)
    assert torch.allclose(random_colour(batch, 0, 0.0, 0.0, 0.0), batch, atol=1e-6)


@given(shapes, st.integers(0, 9))
def test_colours_stay_between_black_and_white_and_grey_stays_grey(shape: tuple[int, ...], seed: int) -> None:
    batch = images(shape) / math.prod(shape)
    result = random_colour(batch, seed, 1.0, 1.0, 1.0)
    assert result.shape == batch.shape
    assert result.min() >= 0
    assert result.max() <= 1
    grey = batch[:, :1].expand_as(batch)
    changed = random_colour(grey, seed, 1.0, 1.0, 1.0)
    assert torch.allclose(changed, changed[:, :1].expand_as(changed), atol=1e-6)


@given(shapes, st.floats(0, 1), st.integers(0, 9))
def test_erasing_blackens_one_small_rectangle(shape: tuple[int, ...], fraction: float, seed: int) -> None:
    batch = images(shape)
    for image, original in zip(random_erasing(batch, seed, 1.0, fraction), batch, strict=True):
        black = image[0] == 0
        assert torch.equal(image[:, ~black], original[:, ~black])
        assert black.sum() <= fraction * black.numel() + 1e-6
        rows, cols = black.any(1), black.any(0)
        assert torch.equal(black, rows[:, None] & cols[None, :])
    assert torch.equal(random_erasing(batch, seed, 0.0), batch)


def test_erasing_happens_as_often_as_asked_and_everywhere() -> None:
    batch = torch.ones(2000, 1, 8, 8)
    erased = random_erasing(batch, 0, 0.3, 0.5) == 0
    assert 0.2 < erased.flatten(1).any(1).float().mean() < 0.32  # some rectangles have no pixel
    assert erased.any(0).all()


@settings(deadline=None)
@given(shapes, st.integers(0, 9))
def test_an_affine_change_of_nothing_changes_nothing(shape: tuple[int, ...], seed: int) -> None:
    batch = images(shape)
    assert torch.allclose(random_affine(batch, seed, 0.0, 0.0), batch, rtol=1e-4)


def blob(rows: int, cols: int, row: float, col: float) -> Tensor:
    """A soft dot at a place measured in pixels from the centre."""
    r = torch.arange(rows) - (rows - 1) / 2 - row
    c = torch.arange(cols) - (cols - 1) / 2 - col
    return torch.exp(-(r[:, None] ** 2 + c[None, :] ** 2) / 8)


def centre(image: Tensor) -> tuple[float, float]:
    rows, cols = image.shape
    mass = image.sum()
    row = (image.sum(1) * (torch.arange(rows) - (rows - 1) / 2)).sum() / mass
    col = (image.sum(0) * (torch.arange(cols) - (cols - 1) / 2)).sum() / mass
    return float(row), float(col)


def test_turning_keeps_distances_also_in_images_that_are_not_square() -> None:
    dots = blob(40, 80, 0.0, 12.0).expand(200, 1, 40, 80)
    places = [centre(image[0]) for image in random_affine(dots, 0, max_degrees=30.0, max_scale=0.0)]
    angles = [math.degrees(math.atan2(row, col)) for row, col in places]
    assert all(abs(math.hypot(*place) - 12) < 0.2 for place in places)
    assert 26 < max(angles) <= 30.2
    assert -30.2 <= min(angles) < -26


def test_scaling_stays_within_its_factor_both_ways() -> None:
    dots = blob(40, 80, 6.0, 12.0).expand(200, 1, 40, 80)
    factors = [
        math.hypot(*centre(image[0])) / math.hypot(6, 12)
        for image in random_affine(dots, 0, max_degrees=0.0, max_scale=0.25)
    ]
    assert 1.2 < max(factors) < 1.26
    assert 0.79 < min(factors) < 0.84


def test_affine_shifts_are_fractions_of_the_size() -> None:
    dots = blob(40, 80, 0.0, 0.0).expand(200, 1, 40, 80)
    places = [centre(image[0]) for image in random_affine(dots, 0, 0.0, 0.0, max_shift=0.1)]
    assert 3.6 < max(abs(row) for row, _ in places) < 4.05
    assert 7.2 < max(abs(col) for _, col in places) < 8.05


def test_composition_draws_from_one_stream() -> None:
    batch = images((5, 1, 6, 6))
    generator = torch.Generator().manual_seed(1)
    expected = random_shift(random_flip(batch, generator), generator)
    assert torch.equal(compose(random_flip, random_shift)(batch, torch.Generator().manual_seed(1)), expected)


def test_only_the_images_of_a_batch_are_changed() -> None:
    batch, labels = images((5, 1, 6, 6)), torch.arange(5)
    expected = random_flip(batch, 1)
    lifted = on_images(random_flip)

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    assert torch.equal(lifted(batch, seeded()), expected)
    for whole in ((batch, labels), [batch, labels]):
        result = lifted(whole, seeded())
        assert type(result) is type(whole)
        assert all_same(list(result), [expected, labels])
    result = on_images(random_flip, "image")({"image": batch, "label": labels}, seeded())
    assert all_same(list(result.values()), [expected, labels])


def test_augmented_batches_resume_exactly() -> None:
    def make() -> Any:
        batches = as_batches((images((10, 1, 6, 6)), torch.arange(10)), batch_size=3)
        return mapped(batches, on_images(compose(random_affine, random_shift, random_erasing)))

    expected = take(make(), 9)
    begun, resumed = make(), make()
    take(begun, 4)
    resumed.seek(begun.position())
    assert all_same(take(resumed, 5), expected[4:])


@pytest.mark.parametrize("bad", [torch.ones(3, 4, 4), torch.ones(2, 1, 4, 4, dtype=torch.uint8)])
@pytest.mark.parametrize("function", [*EVERY, random_colour])
def test_other_tensors_are_refused(function: Any, bad: Tensor) -> None:
    with pytest.raises(DataError, match=r"float images \[B, C, H, W\]"):
        function(bad, 0)
