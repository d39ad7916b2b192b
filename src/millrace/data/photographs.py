"""Real pictures that need no download: patches of the photographs that scikit-image and scikit-learn bring along.

A patch's class is the photograph it is from. Photographs are divided into tiles with strips of `MARGIN` pixels between
them, and every tile is of one part alone (training, validation or test), so that no pixel is in two parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from millrace.data.images import read_image
from millrace.data.randomness import generator_from
from millrace.errors import DataError

# name -> (file of scikit-image, by how much it is shrunk)
PHOTOGRAPHS: Mapping[str, tuple[str, int]] = {
    "astronaut": ("astronaut.png", 1),
    "bricks": ("brick.png", 1),
    "cameraman": ("camera.png", 1),
    "cat": ("chelsea.png", 1),
    "cell": ("cell.png", 1),
    "clock": ("clock_motion.png", 1),
    "coffee": ("coffee.png", 1),
    "coins": ("coins.png", 1),
    "galaxies": ("hubble_deep_field.jpg", 2),
    "grass": ("grass.png", 1),
    "gravel": ("gravel.png", 1),
    "handwriting": ("text.png", 1),
    "moon": ("moon.png", 1),
    "motorcycle": ("motorcycle_left.png", 1),
    "print": ("page.png", 1),
    "retina": ("retina.jpg", 2),
    "rocket": ("rocket.jpg", 1),
    "tissue": ("ihc.png", 1),
}
# of scikit-learn
SAMPLES: Mapping[str, str] = {"flower": "flower.jpg", "temple": "china.jpg"}
MARGIN = 8  # pixels between tiles
PATCH, TILE, STEP = 40, 48, 4  # pixels; patches begin at every STEP within their tile
TEST, VALIDATION = 0.25, 0.1  # shares of the tiles of every photograph


@dataclass(frozen=True)
class Patches:
    """Patches of one part, equally many of each class."""

    images: Tensor  # float32 [n, 3, PATCH, PATCH], from 0 (black) to 1
    labels: Tensor  # int64 [n], indices into the sorted names of the photographs


def read_photographs(scikit_image: Path, scikit_learn: Path) -> dict[str, Tensor]:
    """Every photograph by its name, sorted: float32 [3, rows, cols] from 0 to 1; grey ones have three equal channels.

    Args: scikit_image, scikit_learn: the folders of their pictures ("skimage/data", "sklearn/datasets/images").

    Raises: DataError where one of them is not there.
    """
    found = {name: read_image(scikit_learn / file) for name, file in SAMPLES.items()}
    for name, (file, shrunk) in PHOTOGRAPHS.items():
        found[name] = functional.avg_pool2d(read_image(scikit_image / file), shrunk)
    return dict(sorted(found.items()))


def tiles(rows: int, cols: int) -> list[tuple[int, int]]:
    """The top left corners of all tiles of a photograph."""
    pitch = TILE + MARGIN
    return [(top, left) for top in range(0, rows - TILE + 1, pitch) for left in range(0, cols - TILE + 1, pitch)]


def tiles_in_parts(name: str, rows: int, cols: int) -> dict[str, list[tuple[int, int]]]:
    """The tiles of a photograph for "train", "validation" and "test", each in a random order that never changes."""
    corners = tiles(rows, cols)
    order = torch.randperm(len(corners), generator=generator_from("tiles", name)).tolist()
    shuffled = [corners[index] for index in order]
    test = max(1, round(TEST * len(shuffled)))
    validation = max(1, round(VALIDATION * len(shuffled)))
    return {
        "test": shuffled[:test],
        "validation": shuffled[test : test + validation],
        "train": shuffled[test + validation :],
    }


def patches(photographs: Mapping[str, Tensor], part: str, count: int) -> Patches:
    """`count` patches of every photograph, evenly from its tiles of one part ("train", "validation" or "test").

    Raises: DataError where a photograph has fewer.
    """
    images = [patch for name in sorted(photographs) for patch in _patches_of(name, photographs[name], part, count)]
    labels = torch.arange(len(photographs)).repeat_interleave(count)
    return Patches(torch.stack(images), labels)


def _patches_of(name: str, photograph: Tensor, part: str, count: int) -> list[Tensor]:
    corners = tiles_in_parts(name, *photograph.shape[1:])[part]
    within = [(down, right) for down in range(0, TILE - PATCH + 1, STEP) for right in range(0, TILE - PATCH + 1, STEP)]
    if count > len(corners) * len(within):
        raise DataError(
            f"The photograph {name!r} has {len(corners) * len(within)} patches for {part}, fewer than the {count} "
            "asked for. Ask for fewer of each class."
        )
    orders = [torch.randperm(len(within), generator=generator_from("within", name, *corner)) for corner in corners]
    found = []
    for index in range(count):  # one of every tile, then another one of every tile, …
        turn, tile = divmod(index, len(corners))
        down, right = within[int(orders[tile][turn])]
        top, left = corners[tile][0] + down, corners[tile][1] + right
        found.append(photograph[:, top : top + PATCH, left : left + PATCH])
    return found
