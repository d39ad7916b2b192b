"""Pictures to learn from without labels, and labelled ones to see what was learned about one class.

The labelled ones are in two parts: those that training may have seen, to choose a detector with, and unseen ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from millrace.data.crops import random_crops, standardized
from millrace.data.labelled_pictures import labelled_pictures
from millrace.data.split import holdout
from millrace.errors import DataError

_OTHERS = 250  # crops to choose with, and as many to measure with
_LEFT = 0.6  # of a photograph's width, for training


class Labelled(NamedTuple):
    """Pictures, and whether they show the class."""

    images: Tensor  # [n, 1, rows, cols], standardized
    belongs: Tensor  # bool [n]


class ClassPictures(NamedTuple):
    """All that a data set has; labels are for after training alone."""

    background: Tensor  # to learn from, [n, 1, rows, cols]
    repeated: Tensor  # to learn from several times each, [n, 1, rows, cols]
    seen: Labelled
    test: Labelled
    target: str  # what the class is called

    def learned_from(self, rows: Tensor, share: float) -> Tensor:
        """Those of the background's rows, and the repeated pictures so often that they are about a share of all."""
        chosen = self.background[rows]
        if not len(self.repeated):
            return chosen
        times = max(1, round(len(chosen) * share / (1 - share) / len(self.repeated)))
        return torch.cat([chosen, self.repeated.repeat(times, 1, 1, 1)])

    def labelled(self) -> dict[str, Tensor]:
        """The labelled pictures as one batch for `in_parts`: {"images", "belongs", "seen"}, of n each."""
        return {
            "images": torch.cat([self.seen.images, self.test.images]),
            "belongs": torch.cat([self.seen.belongs, self.test.belongs]),
            "seen": torch.arange(len(self.seen.images) + len(self.test.images)) < len(self.seen.images),
        }


def in_parts(batch: Mapping[str, Tensor]) -> tuple[Labelled, Labelled]:
    """The pictures to choose with, and those to measure with, of what `ClassPictures.labelled` put together."""
    seen, images, belongs = batch["seen"], batch["images"], batch["belongs"]
    return Labelled(images[seen], belongs[seen]), Labelled(images[~seen], belongs[~seen])


def face_pictures(faces: Tensor, photos: Sequence[Tensor], crops: int, generator: torch.Generator) -> ClassPictures:
    """Half of the faces, and the photographs' left parts, are for training; the other halves and parts for the test.

    Args:
        faces: [n, 1, side, side], from 0 to 1.
        photos: of anything but faces, [1, rows, cols] each, from 0 to 1.
        crops: of photographs, to learn from.
        generator: of their places and sizes.
    """
    side = faces.shape[-1]
    left, right = _parts(photos)
    faces = standardized(faces)
    known, new = (faces[half] for half in holdout(len(faces), 0.5))
    # The labelled ones come first, so that they do not depend on how many crops there are to learn from.
    seen = _labelled(known, _crops(left, _OTHERS, side, generator))
    test = _labelled(new, _crops(right, _OTHERS, side, generator))
    return ClassPictures(_crops(left, crops, side, generator), known, seen, test, "face")


def cat_pictures(photos: Sequence[Tensor], side: int, crops: int, generator: torch.Generator) -> ClassPictures:
    """Crops of the first photograph, of a cat, against those of the others; training has the left parts of all."""
    left, right = _parts(photos)
    known, new = (_crops(part[:1], _OTHERS, side, generator) for part in (left, right))
    seen = _labelled(known, _crops(left[1:], _OTHERS, side, generator))
    test = _labelled(new, _crops(right[1:], _OTHERS, side, generator))
    return ClassPictures(_crops(left[1:], crops, side, generator), known, seen, test, "cat")


def own_pictures(source: str, target: str, side: int) -> ClassPictures:
    """A user's pictures: half of each class to learn from (without labels) and to choose with, half for the test.

    Args:
        source: as for `labelled_pictures`.
        target: the class; "" takes the first by name.
        side: rows and columns that they are scaled to.

    Raises:
        DataError: they cannot be read, there is no such class, or too few pictures are of it or of others.
    """
    images, labels, classes = labelled_pictures(source, side)
    target = target or classes[0]
    if target not in classes:
        raise DataError(f"The data {source} has no class {target!r}. Set target to one of: {', '.join(classes[:12])}.")
    images, belongs = standardized(images.mean(1, keepdim=True)), labels == classes.index(target)
    if min(int(belongs.sum()), int((~belongs).sum())) < 4:
        raise DataError(
            f"The data {source} has {int(belongs.sum())} pictures of {target!r} and {int((~belongs).sum())} others. "
            "Both are halved, to choose a unit and to measure it: give four of each, at the very least."
        )
    seen, test = (Labelled(images[half], belongs[half]) for half in holdout(len(images), 0.5, labels=belongs.long()))
    return ClassPictures(seen.images, seen.images[:0], seen, test, target)


def _parts(photos: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The left of every photograph, for training, and the right."""
    cuts = [int(photo.shape[-1] * _LEFT) for photo in photos]
    left = [photo[..., :cut] for photo, cut in zip(photos, cuts, strict=True)]
    return left, [photo[..., cut:] for photo, cut in zip(photos, cuts, strict=True)]


def _labelled(those: Tensor, others: Tensor) -> Labelled:
    images = torch.cat([those, others])
    return Labelled(images, torch.arange(len(images)) < len(those))


def _crops(photos: Sequence[Tensor], count: int, side: int, generator: torch.Generator) -> Tensor:
    """Standardized crops, of every photograph as many, give or take one."""
    counts = [count // len(photos) + (index < count % len(photos)) for index in range(len(photos))]
    cut = [random_crops(photo, n, side, generator) for photo, n in zip(photos, counts, strict=True)]
    return standardized(torch.cat(cut))
