"""A picture of words at their places."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_FONT, _DOT, _MARGIN = 15, 3, 90  # pixels
_INK, _FAINT = 0.45, (200, 200, 200)


def word_map(
    points: Tensor,
    words: Sequence[str],
    groups: Sequence[int],
    lines: Sequence[tuple[int, int]] = (),
    size: tuple[int, int] = (720, 960),
) -> Tensor:
    """Draw words at their places.

    Args: points: [N, 2], in any unit; the picture holds all of them. words: N. groups: N, the number of each one's
        colour, from 0. lines: pairs of words to be joined. size: rows, cols.

    Returns: a picture, float [3, rows, cols] from 0 to 1.
    """
    rows, cols = size
    low, high = points.amin(0), points.amax(0)
    unit = (points - low) / (high - low).clamp(min=1e-9)
    places = [(_MARGIN + x * (cols - 2 * _MARGIN), rows - _MARGIN / 2 - y * (rows - _MARGIN)) for x, y in unit.tolist()]
    image = Image.new("RGB", (cols, rows), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(_FONT)
    for one, other in lines:
        draw.line([places[one], places[other]], fill=_FAINT, width=1)
    count = max(groups, default=0) + 1
    for (x, y), word, group in zip(places, words, groups, strict=True):
        red, green, blue = colorsys.hls_to_rgb(group / count, _INK * 0.9, 0.8)
        colour = round(255 * red), round(255 * green), round(255 * blue)
        draw.ellipse([x - _DOT, y - _DOT, x + _DOT, y + _DOT], fill=colour)
        draw.text((x + _DOT + 2, y), word, fill=colour, font=font, anchor="lm")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
