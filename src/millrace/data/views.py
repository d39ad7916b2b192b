"""What a network is shown of a picture where nothing is random: its middle, or patches from all over it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from millrace.data.images import read_image

SEEN = 0.8  # of a picture's height and width
_PATCHES = 7  # of a large picture, along either side


def middle(images: Tensor, size: int) -> Tensor:
    """Four fifths of the height and of the width, as random crops have on average, scaled.

    Args:
        images: float [n, channels, side, side].
        size: rows and columns of the result, in pixels.
    """
    side = round(images.shape[-1] * SEEN)
    first = (images.shape[-1] - side) // 2
    cut = images[..., first : first + side, first : first + side].contiguous()
    return cut if side == size else functional.interpolate(cut, (size, size), mode="bilinear", antialias=True)


def views(file: Path, size: int, patch: int | None = None) -> Tensor:
    """The middle of a picture, or the middles of up to 49 patches that lie evenly over it.

    Args:
        file: of the picture.
        size: rows and columns of a view, in pixels.
        patch: rows and columns of a patch. A picture smaller than this is one view, and so is any without it; such
            pictures are scaled to a square.

    Returns: float [n, 3, size, size] from 0 to 1.

    Raises:
        DataError: the file is missing or unreadable.
    """
    picture = read_image(file)
    rows, cols = picture.shape[1:]
    if patch is None or min(rows, cols) < patch:
        side = round(size / SEEN)
        return middle(read_image(file, side, side)[None], size)
    last = _PATCHES - 1
    tops, lefts = (sorted({round(i * (n - patch) / last) for i in range(_PATCHES)}) for n in (rows, cols))
    found = [picture[:, top : top + patch, left : left + patch] for top in tops for left in lefts]
    return middle(torch.stack(found), size)
