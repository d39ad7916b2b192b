"""Scans: where the digit stands, how large and in which colours does not matter; a scan is itself again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from millrace.data.scans import BLOCK, SIZE, scan_of
from millrace.errors import DataError

NOWHERE = Path("picture.png")


def with_opacity(grey: Tensor) -> Tensor:
    return torch.stack([grey, grey, grey, torch.ones_like(grey)])


def a_seven(side: int = 120) -> Tensor:
    """Black on white, [side, side]."""
    page, unit = torch.ones(side, side), side // 12
    page[3 * unit : 4 * unit, 4 * unit : 8 * unit] = 0
    page[3 * unit : 9 * unit, 7 * unit : 8 * unit] = 0
    return page


def test_a_digit_in_a_corner_is_the_same_as_in_the_middle() -> None:
    middle = with_opacity(a_seven())
    corner = torch.nn.functional.pad(middle, (300, 0, 0, 150), value=1.0)
    assert torch.allclose(scan_of(middle, NOWHERE), scan_of(corner, NOWHERE))


def test_colours_and_size_do_not_matter() -> None:
    page = a_seven()
    expected = scan_of(with_opacity(page), NOWHERE)
    assert expected.shape == (1, SIZE, SIZE)
    assert 0.2 <= float(expected.mean()) < float(expected.max()) <= 1
    nothing = torch.stack([torch.ones_like(page)] * 3 + [1 - page])  # white ink on nothing
    for picture in (with_opacity(1 - page), with_opacity(0.3 + 0.6 * page), with_opacity(a_seven(480)), nothing):
        assert torch.allclose(scan_of(picture, NOWHERE), expected, atol=0.03)


def test_scans_are_left_almost_as_they_are() -> None:
    """A scan that was drawn large is the scan again."""
    images = torch.tensor(load_digits().images[:100], dtype=torch.float32)[:, None] / BLOCK**2
    large = torch.nn.functional.interpolate(images, scale_factor=20, mode="nearest")
    again = torch.stack([scan_of(with_opacity(ink[0]), NOWHERE) for ink in large])
    assert (again - images).abs().mean() < 0.08


@pytest.mark.parametrize("shade", [0.0, 0.5, 1.0])
def test_a_picture_without_ink_is_refused(shade: float) -> None:
    with pytest.raises(DataError, match=r"picture\.png shows no digit"):
        scan_of(with_opacity(torch.full((20, 30), shade)), NOWHERE)
