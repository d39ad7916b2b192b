"""Small pictures out of large ones, made alike in brightness and contrast."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from millrace.errors import DataError


def random_crops(photo: Tensor, count: int, side: int, generator: torch.Generator, zoom: float = 8.0) -> Tensor:
    """Square cuts at random places, of random sizes, scaled to one size.

    Args:
        photo: float [C, H, W].
        count: how many.
        side: rows and columns of the result.
        generator: of places and sizes; these lie evenly, in their logarithm, from `side` to `zoom` times that (or to
            what the photo has).

    Returns: [count, C, side, side].

    Raises:
        DataError: the photo is smaller than a crop.
    """
    rows, cols = photo.shape[-2:]
    if min(rows, cols) < side:
        raise DataError(
            f"Crops of {side} by {side} pixels do not fit into a photo of {rows} by {cols}. Take a larger one."
        )
    largest = min(zoom, min(rows, cols) / side)
    cut = []
    for size_draw, row_draw, col_draw in torch.rand(count, 3, generator=generator).tolist():
        size = int(side * math.exp(size_draw * math.log(largest)))
        top, left = int(row_draw * (rows - size + 1)), int(col_draw * (cols - size + 1))
        window = photo[None, :, top : top + size, left : left + size]
        cut.append(functional.interpolate(window, size=(side, side), mode="area"))
    return torch.cat(cut) if cut else photo.new_zeros(0, len(photo), side, side)


def standardized(images: Tensor, floor: float = 0.02) -> Tensor:
    """Each image at mean 0 and variance 1, so that neither its brightness nor its contrast tells what it shows.

    Args:
        images: [B, C, H, W], from 0 to 1.
        floor: standard deviation below which an image counts as even, and its noise is not amplified further.
    """
    centred = images - images.mean((1, 2, 3), keepdim=True)
    return centred / centred.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(floor)


def visible(images: Tensor, zoom: int = 1) -> Tensor:
    """Standardized pictures [n, C, H, W] as they can be shown: from 0 to 1, and so many times as large."""
    return functional.interpolate((images / 5 + 0.5).clamp(0, 1), scale_factor=zoom, mode="nearest")
