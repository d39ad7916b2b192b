"""Views: the middle of a picture, in any size, and patches that reach from edge to edge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from millrace.data.images import read_image, write_png
from millrace.data.views import middle, views
from millrace.errors import DataError


def test_the_middle_is_four_fifths_of_either_side() -> None:
    images = torch.zeros(2, 3, 40, 40)
    images[..., 4:36, 4:36] = 1
    assert middle(images, 32).shape == (2, 3, 32, 32)
    assert middle(images, 32).eq(1).all()
    for size in (16, 48):
        assert torch.allclose(middle(images, size), torch.ones(2, 3, size, size))


def test_a_picture_without_patches_is_one_square(tmp_path: Path) -> None:
    file = tmp_path / "it.png"
    write_png(torch.rand(3, 30, 60, generator=torch.Generator().manual_seed(0)), file)
    (view,) = views(file, 32)
    assert view.equal(middle(read_image(file, 40, 40)[None], 32)[0])
    assert views(file, 32, patch=31).equal(view[None])  # too small for one


def test_patches_lie_evenly_from_edge_to_edge(tmp_path: Path) -> None:
    file = tmp_path / "it.png"
    write_png(torch.rand(3, 46, 100, generator=torch.Generator().manual_seed(0)), file)
    picture, found = read_image(file), views(file, 32, patch=40)
    assert found.shape == (49, 3, 32, 32)
    assert found[0].equal(picture[:, 4:36, 4:36])
    assert found[-1].equal(picture[:, 10:42, 64:96])
    write_png(torch.rand(3, 40, 41), file)
    assert len(views(file, 32, patch=40)) == 2  # no patch twice


def test_a_file_that_is_no_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no image file"):
        views(tmp_path / "none.png", 32, patch=40)
