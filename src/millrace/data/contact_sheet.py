"""Many small pictures as one, each with a caption and a frame that says whether it is right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_FRAME, _CAPTION = 2, 12  # pixels
_RIGHT, _WRONG, _PAPER, _INK = (40, 160, 60), (210, 40, 40), (255, 255, 255), (0, 0, 0)


def contact_sheet(
    images: Tensor, captions: Sequence[str], right: Sequence[bool], *, columns: int = 8, zoom: int = 2
) -> Tensor:
    """Pictures in rows, framed green where they are right and red where not.

    Args:
        images: float [n, 1 or 3, H, W] from 0 to 1, at least one.
        captions: n texts for below; what does not fit is cut off.
        right: n times whether the frame is green.
        columns: pictures in a row.
        zoom: pixels of the sheet for a pixel of a picture.

    Returns: float [3, rows, cols] from 0 to 1.
    """
    count, _, height, width = images.shape
    cell = (width * zoom + 4 * _FRAME, height * zoom + 4 * _FRAME + _CAPTION)
    columns = min(columns, count)
    sheet = Image.new("RGB", (columns * cell[0], -(-count // columns) * cell[1]), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    pixels = (images.detach().cpu().expand(-1, 3, -1, -1).clamp(0, 1) * 255).round().to(torch.uint8)
    for index in range(count):
        left, top = index % columns * cell[0] + _FRAME, index // columns * cell[1] + _FRAME
        picture = Image.fromarray(pixels[index].permute(1, 2, 0).contiguous().numpy(), "RGB")
        edge = (left, top, left + width * zoom + 2 * _FRAME - 1, top + height * zoom + 2 * _FRAME - 1)
        draw.rectangle(edge, fill=_RIGHT if right[index] else _WRONG)
        sheet.paste(
            picture.resize((width * zoom, height * zoom), Image.Resampling.NEAREST), (left + _FRAME, top + _FRAME)
        )
        _write(draw, (left, edge[3] + 1), captions[index], cell[0] - _FRAME, font)
    return torch.from_numpy(np.array(sheet, dtype=np.uint8)).permute(2, 0, 1).to(torch.float32) / 255


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int, font: object) -> None:
    while text and draw.textlength(text, font=font) > width:  # type: ignore[arg-type]
        text = text[:-1]
    draw.text(place, text, fill=_INK, font=font)  # type: ignore[arg-type]
