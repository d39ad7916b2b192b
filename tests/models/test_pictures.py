"""Sheets of frames and curves: where what ends up."""

from __future__ import annotations

import pytest
import torch

from millrace.models.pictures import contact_sheet, curves


def test_a_sheet_shows_frames_from_the_first_to_the_last_line_by_line() -> None:
    frames = (torch.arange(101) / 200).view(-1, 1, 1, 1).expand(-1, 1, 3, 5)
    sheet = contact_sheet(frames, rows=2, cols=3, gap=1)
    assert sheet.shape == (1, 2 * 3 + 1, 3 * 5 + 2)
    tiles = [float(sheet[0, row, col]) for row in (0, 4) for col in (0, 6, 12)]
    assert tiles == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert (sheet[0, 3] == 1).all()
    assert (sheet[0, :, 5] == 1).all()


def test_places_that_no_frame_takes_are_white() -> None:
    sheet = contact_sheet(torch.zeros(2, 3, 4, 4), rows=2, cols=2, gap=1)
    assert sheet.shape == (3, 9, 9)
    assert (sheet[:, 5:] == 1).all()
    assert (sheet[:, :4, :4] == 0).all()


def test_a_curve_goes_from_its_lowest_value_to_its_highest_without_a_gap() -> None:
    values = torch.stack([torch.linspace(-3, 5, 40), torch.full((40,), 2.0)])
    picture = curves(values, height=16, gap=2)
    assert picture.shape == (1, 2 * 18 - 2, 40)
    rising = picture[0, :16] == 0
    assert rising[15, 0]
    assert rising[0, -1]
    assert rising.any(0).all()
    rows = rising.nonzero()[:, 0]
    assert set(rows.tolist()) == set(range(16))
    assert (picture[0, 16:18] == 1).all()
    assert (picture[0, 33] == 0).all()  # a value that never changes lies at the bottom
