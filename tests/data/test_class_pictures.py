"""Pictures with a class: what is learned from, and labelled ones that come apart as they were put together."""

from __future__ import annotations

import pytest
import torch

from millrace.data.class_pictures import ClassPictures, Labelled, face_pictures, in_parts

SIDE = 12


@pytest.fixture(scope="module")
def faces() -> ClassPictures:
    generator = torch.Generator().manual_seed(0)
    photos = [torch.rand(1, 60, 90, generator=generator) for _ in range(2)]
    return face_pictures(torch.rand(10, 1, SIDE, SIDE, generator=generator), photos, 90, generator)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6])
def test_repeated_pictures_are_about_a_share_of_what_is_learned_from(share: float, faces: ClassPictures) -> None:
    rows = torch.arange(0, 90, 2)
    found = faces.learned_from(rows, share)
    assert found[:45].equal(faces.background[rows])
    repeated = len(found) - 45
    assert repeated % len(faces.repeated) == 0
    assert repeated >= len(faces.repeated)
    assert abs(repeated - share / (1 - share) * 45) <= len(faces.repeated)
    for part in found[45:].split(len(faces.repeated)):
        assert part.equal(faces.repeated)


def test_without_repeated_pictures_there_is_the_background_alone(faces: ClassPictures) -> None:
    alone = faces._replace(repeated=faces.repeated[:0])
    assert alone.learned_from(torch.tensor([3, 1]), 0.5).equal(faces.background[[3, 1]])


def test_the_labelled_ones_come_apart_as_they_were_put_together(faces: ClassPictures) -> None:
    batch = faces.labelled()
    order = torch.randperm(len(batch["seen"]), generator=torch.Generator().manual_seed(0))
    for part, whole in zip(in_parts(batch), (faces.seen, faces.test), strict=True):
        assert all(one.equal(other) for one, other in zip(part, whole, strict=True))
    for part, whole in zip(in_parts({n: t[order] for n, t in batch.items()}), (faces.seen, faces.test), strict=True):
        assert isinstance(part, Labelled)
        assert int(part.belongs.sum()) == int(whole.belongs.sum()) == 5
        assert len(part.images) == len(whole.images)
