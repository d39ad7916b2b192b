"""Patches of photographs: no pixel is in two parts, nor nearer than the margin to another part's."""

from __future__ import annotations

from pathlib import Path

import pytest
import skimage.data
import sklearn.datasets
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from millrace.data.photographs import MARGIN, PATCH, TILE, patches, read_photographs, tiles_in_parts
from millrace.errors import DataError

PARTS = ("train", "validation", "test")


def pixels(rows: int, cols: int) -> Tensor:
    """A photograph whose every pixel says where it is: its row, its column and 0."""
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    return torch.stack([row, col, torch.zeros_like(row)]).float()


@settings(deadline=None, max_examples=12)
@given(st.integers(230, 420), st.integers(230, 420), st.text("abc", min_size=1, max_size=3))
def test_parts_are_apart_by_the_margin(rows: int, cols: int, name: str) -> None:
    near = torch.zeros(rows, cols, dtype=torch.int64)  # which parts have a pixel within the margin
    for part in PARTS:
        found = patches({name: pixels(rows, cols)}, part, 9).images
        own = torch.zeros(1, 1, rows, cols)
        for row, col in found[:, :2, 0, 0].long().tolist():
            own[0, 0, row : row + PATCH, col : col + PATCH] = 1
        reach = MARGIN // 2  # each of two parts has half of what is between them
        near += (torch.nn.functional.max_pool2d(own, 2 * reach - 1, stride=1, padding=reach - 1)[0, 0] > 0).long()
    assert near.max() == 1


def test_patches_are_windows_of_their_photographs_and_all_different() -> None:
    found = patches({"a": pixels(300, 300), "b": pixels(280, 400) + 1000}, "train", 50)
    assert found.images.shape == (100, 3, PATCH, PATCH)
    assert found.labels.bincount().tolist() == [50, 50]
    for image, label in zip(found.images, found.labels, strict=True):
        first = image[:, :1, :1]
        assert torch.equal(image, pixels(PATCH, PATCH) * torch.tensor([1.0, 1, 0])[:, None, None] + first)
        assert bool(first[2] >= 1000) == bool(label)
    corners = {(int(label), *image[:2, 0, 0].tolist()) for image, label in zip(found.images, found.labels, strict=True)}
    assert len(corners) == 100


def test_every_tile_is_used_before_one_is_used_twice() -> None:
    corners = tiles_in_parts("a", 300, 300)["train"]
    found = patches({"a": pixels(300, 300)}, "train", len(corners)).images[:, :2, 0, 0]
    assert {(int(r) // (TILE + MARGIN), int(c) // (TILE + MARGIN)) for r, c in found.tolist()} == {
        (r // (TILE + MARGIN), c // (TILE + MARGIN)) for r, c in corners
    }


def test_more_patches_than_there_are_are_refused() -> None:
    with pytest.raises(DataError, match=r"'a' has .* patches for test, fewer than the 1000"):
        patches({"a": pixels(300, 300)}, "test", 1000)


def test_the_photographs_are_there() -> None:
    folders = Path(skimage.data.__file__).parent, Path(sklearn.datasets.__file__).parent / "images"
    found = read_photographs(*folders)
    assert len(found) == 20
    assert list(found) == sorted(found)
    assert all(len(photo) == 3 and photo.min() >= 0 and photo.max() <= 1 for photo in found.values())
    for part, count in (("train", 120), ("validation", 16), ("test", 40)):
        assert len(patches(found, part, count).labels) == 20 * count
    with pytest.raises(DataError, match="no image file"):
        read_photographs(folders[1], folders[1])
