"""Pictures of digits made to look like scikit-learn's 8×8 scans, as NIST's programs prepared these.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from millrace.errors import DataError

SIZE, BLOCK = 8, 4  # pixels of a side; of each, the pixels of the bitmap that are counted
_LEAST_INK = 0.2  # of the bitmap; the scans have 0.3 on average
_LEAST_CONTRAST = 0.1  # between ink and paper, of black to white


def scan_of(picture: Tensor, file: Path) -> Tensor:
    """A picture made to look like a scan.

    As NIST's programs did: cut out the ink, scale it to 32 rows without changing its proportions, centre it, and count
    the ink in every block of 4×4. Strokes much thinner than the scans' are thickened.

    Args:
        picture: float [4, H, W] from 0 to 1, with transparency.
        file: where it is from, for messages.

    Returns: float [1, 8, 8] from 0 to 1.

    Raises:
        DataError: there is no ink in it.
    """
    ink = _cropped(_ink(picture, file))
    side = SIZE * BLOCK
    rows, cols = ink.shape
    zoom = side / max(rows, cols)
    size = (max(1, round(rows * zoom)), max(1, round(cols * zoom)))
    scaled = functional.interpolate(ink[None, None], size=size, mode="area")
    below, right = side - size[0], side - size[1]
    bitmap = functional.pad(scaled, (right // 2, right - right // 2, below // 2, below - below // 2))
    while bitmap.mean() < _LEAST_INK:
        thicker = functional.max_pool2d(bitmap, 3, stride=1, padding=1)
        if thicker.mean() < 1.05 * bitmap.mean():
            break
        bitmap = thicker
    return functional.avg_pool2d(bitmap, BLOCK)[0]


def _ink(picture: Tensor, file: Path) -> Tensor:
    """How much ink is at each pixel, [H, W] from 0 to 1, whichever of ink and paper is the darker one."""
    grey, opacity = picture[:3].mean(0), picture[3]
    on_white, shape = _contrast(grey * opacity + (1 - opacity)), _contrast(opacity)
    ink = on_white if on_white.max() >= _LEAST_CONTRAST else shape  # white ink on nothing
    if ink.max() < _LEAST_CONTRAST:
        raise DataError(
            f"The image {file} shows no digit: all of it is about equally light. Give one digit, dark on light or "
            "light on dark."
        )
    ink = ink / ink.max()
    return torch.where(ink < 0.2, 0.0, ink)  # specks and shadows of the paper


def _contrast(values: Tensor) -> Tensor:
    """How far every pixel, [H, W], is from those along the border, which are mostly paper."""
    border = torch.cat([values[0], values[-1], values[:, 0], values[:, -1]])
    return (values - border.median()).abs()


def _cropped(ink: Tensor) -> Tensor:
    """The smallest part that holds all ink."""
    rows, cols = ink.amax(1).nonzero()[:, 0], ink.amax(0).nonzero()[:, 0]
    return ink[int(rows[0]) : int(rows[-1]) + 1, int(cols[0]) : int(cols[-1]) + 1]
