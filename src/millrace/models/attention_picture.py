"""Attention as a picture: what was written from top to bottom, what was read from left to right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL, FONT = 18, 13  # pixels


def attention_picture(weights_TS: Tensor, written: Sequence[str], read: Sequence[str]) -> Tensor:
    """Weights from 0 (white) to 1 (black), with the words at the edges.

    Args:
        weights_TS: [T, S], from 0 to 1.
        written: T labels, of the rows.
        read: S labels, of the columns, which stand upright.

    Returns: float [1, rows, cols] from 0 to 1.
    """
    font = ImageFont.load_default(FONT)
    left, top = (max((round(font.getlength(label)) for label in labels), default=0) + 6 for labels in (written, read))
    rows, cols = weights_TS.shape
    picture = Image.new("L", (left + cols * CELL, top + rows * CELL), 255)
    for number, label in enumerate(read):
        strip = Image.new("L", (top, CELL), 255)
        ImageDraw.Draw(strip).text((3, 1), label, font=font, fill=0)
        picture.paste(strip.rotate(90, expand=True), (left + number * CELL, 0))
    draw = ImageDraw.Draw(picture)
    for number, label in enumerate(written):
        draw.text((left - 3, top + number * CELL + 1), label, font=font, fill=0, anchor="ra")
    shades = 255 - (weights_TS.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    cells = shades.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)
    picture.paste(Image.fromarray(cells.numpy()), (left, top))
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]
