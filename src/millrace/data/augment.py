"""Random changes to whole batches of images, as pure functions of (images, generator).

Images are float [B, C, H, W]; what comes into view from outside an image is 0. Every image gets its own random choice,
drawn from the generator alone, on the CPU, so that the same generator state gives the same result on any device.
`compose` chains functions, and `on_images` lifts one to batches that hold images and labels, for `mapped`:

    augment = compose(partial(random_affine, max_degrees=10), partial(random_shift, max_pixels=1))
    batches = mapped(batches, on_images(augment))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from millrace.data.batches import Batch
from millrace.errors import DataError

Augmentation: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]


def random_shift(images: Tensor, generator: torch.Generator | int, max_pixels: int = 2) -> Tensor:
    """Move each image by a whole number of pixels, at most `max_pixels` up or down and sideways."""
    return random_crop(images, generator, images.shape[-2], images.shape[-1], max_pixels)


def random_crop(images: Tensor, generator: torch.Generator | int, rows: int, cols: int, padding: int = 0) -> Tensor:
    """Cut a window of rows × cols out of each image, after adding `padding` black pixels on every side.

    Raises:
        DataError: the window is larger than the padded image.
    """
    count, _, height, width = _shape(images)
    spare_rows, spare_cols = height + 2 * padding - rows, width + 2 * padding - cols
    if min(rows, cols, spare_rows + 1, spare_cols + 1, padding + 1) < 1:
        raise DataError(
            f"A window of {rows} by {cols} does not fit into images of {height} by {width} with padding {padding}. "
            "Ask for a smaller window, or for more padding."
        )
    generator = _generator(generator)
    top = torch.randint(0, spare_rows + 1, (count, 1), generator=generator)
    left = torch.randint(0, spare_cols + 1, (count, 1), generator=generator)
    row = (top + torch.arange(rows)).to(images.device)  # [B, rows]
    col = (left + torch.arange(cols)).to(images.device)  # [B, cols]
    padded = functional.pad(images, (padding, padding, padding, padding))
    image = torch.arange(count, device=images.device)
    picked = padded[image[:, None, None], :, row[:, :, None], col[:, None, :]]  # [B, rows, cols, C]
    return picked.permute(0, 3, 1, 2).contiguous()


def random_flip(images: Tensor, generator: torch.Generator | int, probability: float = 0.5) -> Tensor:
    """Mirror each image left to right with this probability."""
    count = _shape(images)[0]
    flipped = torch.rand(count, generator=_generator(generator)) < probability
    return torch.where(flipped.to(images.device)[:, None, None, None], images.flip(-1), images)


def random_resized_crop(
    images: Tensor,
    generator: torch.Generator | int,
    rows: int,
    cols: int,
    least_area: float = 0.08,
    max_stretch: float = 4 / 3,
) -> Tensor:
    """Cut a window of random size, proportions and place out of each image, and scale it to rows × cols.

    Args:
        images: [B, C, H, W].
        generator: of the random numbers, or a seed.
        rows, cols: of the result, in pixels.
        least_area: the window's share of the image's area lies evenly between this and 1.
        max_stretch: its proportions, against the image's, lie within this factor either way, evenly in the logarithm.

    Source: Szegedy et al., "Going deeper with convolutions", CVPR 2015, section 6.
    """
    count, channels, _, _ = _shape(images)
    if min(rows, cols) < 1 or not 0 < least_area <= 1 or max_stretch < 1:
        raise DataError(
            f"A window cannot be scaled to {rows} by {cols} with least_area={least_area}, max_stretch={max_stretch}: "
            "expected at least one pixel, an area above 0 and of at most 1, and a stretch of at least 1."
        )
    draws = torch.rand(4, count, generator=_generator(generator), dtype=torch.float64)
    area = least_area + draws[0] * (1 - least_area)
    stretch = torch.exp((draws[1] * 2 - 1) * math.log(max_stretch))
    high, wide = torch.sqrt(area * stretch).clamp(max=1), torch.sqrt(area / stretch).clamp(max=1)
    down, right = (draws[2] * 2 - 1) * (1 - high), (draws[3] * 2 - 1) * (1 - wide)
    zero = torch.zeros_like(high)
    theta = torch.stack([wide, zero, right, zero, high, down], dim=1).view(count, 2, 3)
    grid = functional.affine_grid(theta.to(images.device, images.dtype), [count, channels, rows, cols], False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def random_colour(
    images: Tensor,
    generator: torch.Generator | int,
    max_brightness: float = 0.2,
    max_contrast: float = 0.2,
    max_saturation: float = 0.2,
) -> Tensor:
    """Change brightness, contrast and saturation of each image; results stay between 0 and 1.

    Each of the three is a factor within 1 + its maximum either way, evenly in its logarithm: of all values, of their
    distance from the image's mean grey, and of their distance from their own pixel's grey (an image of one channel has
    no saturation).

    Source: Howard, "Some improvements on deep convolutional neural network based image classification", 2013.
    """
    count = _shape(images)[0]
    draws = torch.rand(3, count, generator=_generator(generator), dtype=torch.float64) * 2 - 1
    most = torch.tensor([max_brightness, max_contrast, max_saturation], dtype=torch.float64).log1p()
    factors = torch.exp(draws * most[:, None]).to(images.device, images.dtype)[..., None, None, None]
    brightness, contrast, saturation = factors
    grey = images.mean(1, keepdim=True)
    coloured = grey + (images - grey) * saturation
    middle = coloured.mean((1, 2, 3), keepdim=True)
    return ((middle + (coloured - middle) * contrast) * brightness).clamp(0, 1)


def random_affine(
    images: Tensor,
    generator: torch.Generator | int,
    max_degrees: float = 10.0,
    max_scale: float = 0.1,
    max_shift: float = 0.0,
) -> Tensor:
    """Turn, scale and shift each image about its centre, with bilinear interpolation, in one call for the batch.

    Args:
        images: [B, C, H, W].
        generator: of the random numbers, or a seed.
        max_degrees: turns lie evenly within ± this.
        max_scale: sizes lie within a factor of 1 + this either way, evenly in their logarithm.
        max_shift: shifts lie evenly within ± this fraction of the height and of the width.
    """
    count, _, height, width = _shape(images)
    draws = torch.rand(4, count, generator=_generator(generator), dtype=torch.float64) * 2 - 1
    angle = draws[0] * math.radians(max_degrees)
    zoom = torch.exp(draws[1] * math.log1p(max_scale))
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    # affine_grid counts both axes from -1 to 1, so turning must know the image's proportions.
    aspect = height / width
    down, right = draws[2] * 2 * max_shift, draws[3] * 2 * max_shift
    theta = torch.stack([cos, -sin * aspect, right, sin / aspect, cos, down], dim=1).view(count, 2, 3)
    grid = functional.affine_grid(theta.to(images.device, images.dtype), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def random_erasing(
    images: Tensor, generator: torch.Generator | int, probability: float = 0.5, max_fraction: float = 0.25
) -> Tensor:
    """Blacken one random rectangle, of at most `max_fraction` of the area, in each image with this probability.

    Source: Zhong et al., "Random Erasing Data Augmentation", AAAI 2020 (with a constant fill).
    """
    count, _, height, width = _shape(images)
    draws = torch.rand(5, count, generator=_generator(generator), dtype=torch.float64)
    area = draws[1] * max_fraction
    stretch = torch.exp((draws[2] * 2 - 1) * math.log(3.0))  # the paper's range of proportions: 0.3 to 3.3
    part_rows = (torch.sqrt(area * stretch) * height).clamp(max=height).floor()
    part_cols = (torch.sqrt(area / stretch) * width).clamp(max=width).floor()
    top = (draws[3] * (height - part_rows + 1)).floor()
    left = (draws[4] * (width - part_cols + 1)).floor()
    row, col = torch.arange(height), torch.arange(width)
    in_rows = (row >= top[:, None]) & (row < (top + part_rows)[:, None])  # [B, H]
    in_cols = (col >= left[:, None]) & (col < (left + part_cols)[:, None])  # [B, W]
    erased = in_rows[:, :, None] & in_cols[:, None, :] & (draws[0] < probability)[:, None, None]
    return images.masked_fill(erased.to(images.device)[:, None], 0.0)


def compose(*functions: Augmentation) -> Augmentation:
    """One augmentation that applies several in order, all drawing from the same generator."""

    def composed(images: Tensor, generator: torch.Generator) -> Tensor:
        for function in functions:
            images = function(images, generator)
        return images

    return composed


def on_images(function: Augmentation, key: int | str = 0) -> Callable[[Batch, torch.Generator], Batch]:
    """The augmentation on one part of a batch (its first, unless told), or on the batch where that is a tensor."""

    def on_batch(batch: Batch, generator: torch.Generator) -> Batch:
        if isinstance(batch, Tensor):
            return function(batch, generator)
        if isinstance(batch, Mapping):
            return {**batch, key: function(batch[key], generator)}
        parts = list(batch)
        parts[int(key)] = function(parts[int(key)], generator)
        return parts if isinstance(batch, list) else tuple(parts)

    return on_batch


def _generator(generator: torch.Generator | int) -> torch.Generator:
    return torch.Generator().manual_seed(generator) if isinstance(generator, int) else generator


def _shape(images: Tensor) -> torch.Size:
    if images.ndim != 4 or not images.is_floating_point():
        raise DataError(
            f"Augmentations take float images [B, C, H, W], but got {images.dtype} {list(images.shape)}. Convert with "
            ".float() / 255, and give single images a leading axis."
        )
    return images.shape
