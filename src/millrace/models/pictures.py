"""Pictures of sequences: some frames of a film beside each other, and curves of numbers over time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def contact_sheet(frames: Tensor, rows: int, cols: int, gap: int = 2) -> Tensor:
    """Up to rows × cols frames, evenly from the first to the last, line by line.

    Args:
        frames: float [n, channels, h, w], from 0 (black) to 1.
        gap: white pixels between frames.

    Returns: [channels, rows · (h + gap) - gap, cols · (w + gap) - gap].
    """
    chosen = torch.linspace(0, len(frames) - 1, min(rows * cols, len(frames))).round().long()
    tiles = functional.pad(frames[chosen], (0, gap, 0, gap), value=1.0)
    blank = tiles.new_ones(rows * cols - len(tiles), *tiles.shape[1:])
    tiles = torch.cat([tiles, blank])
    lines = [torch.cat(list(tiles[row * cols : (row + 1) * cols]), dim=-1) for row in range(rows)]
    return torch.cat(lines, dim=-2)[:, :-gap, :-gap]


def curves(values: Tensor, height: int = 64, gap: int = 4) -> Tensor:
    """Curves below each other, each as high as its values reach.

    Args:
        values: float [curves, n], finite.
        height: of each, in pixels; a value takes one pixel of width.

    Returns: black on white, [1, curves · (height + gap) - gap, n].
    """
    count, length = values.shape
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    level = ((values - low) / (high - low).clamp_min(1e-12) * (height - 1)).round().long()  # from below
    row = height - 1 - level
    before = torch.cat([row[:, :1], row[:, :-1]], dim=1)
    top, bottom = torch.minimum(row, before), torch.maximum(row, before)
    y = torch.arange(height)[None, :, None]
    inked = (y >= top[:, None]) & (y <= bottom[:, None])  # [curves, height, n]
    paper = torch.ones(count, height + gap, length)
    paper[:, :height][inked] = 0.0
    return paper.reshape(1, count * (height + gap), length)[:, :-gap]
