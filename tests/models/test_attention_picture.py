"""The picture of attention: where its cells are."""

from __future__ import annotations

import torch

from millrace.models.attention_picture import CELL, attention_picture


def test_cells_are_as_dark_as_their_weights() -> None:
    weights = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.25, 0.75]])
    picture = attention_picture(weights, ["été", "END"], ["a", "long label", ""])
    assert picture.shape[1] > 2 * CELL
    assert picture.shape[2] > 3 * CELL
    cells = picture[0, -2 * CELL :, -3 * CELL :]
    middles = cells[CELL // 2 :: CELL, CELL // 2 :: CELL]
    assert torch.allclose(middles, 1 - weights, atol=0.01)


def test_labels_are_written_at_the_edges() -> None:
    weights = torch.zeros(2, 3)
    blank, labelled = (
        attention_picture(weights, [row, row], ["mmm", column, "mmm"])[0] for row, column in (("", ""), ("m", "m"))
    )
    assert labelled[:, : -3 * CELL].min() < 0.5
    assert blank[-2 * CELL :, : -3 * CELL].min() == 1.0
