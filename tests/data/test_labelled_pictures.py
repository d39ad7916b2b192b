"""A user's own pictures, by a folder or the name of a data set."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from millrace.data.labelled_pictures import labelled_pictures
from millrace.errors import DataError

COLOURS = {"blue": (0, 0, 255), "red": (255, 0, 0)}


def table() -> datasets.Dataset:
    pictures = [Image.new("RGB", (9, 5), COLOURS["red"]), Image.new("L", (4, 4), 255), Image.new("RGB", (6, 6))]
    features = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["rot", "weiß", "schwarz"])}
    return datasets.Dataset.from_dict({"picture": pictures, "kind": [0, 1, 2]}, features=datasets.Features(features))


def test_a_folder_has_a_subfolder_for_each_class(tmp_path: Path) -> None:
    for name, colour in COLOURS.items():
        (tmp_path / name).mkdir()
        Image.new("RGB", (7, 9), colour).save(tmp_path / name / "it.png")
    images, labels, names = labelled_pictures(str(tmp_path), 6)
    assert images.shape == (2, 3, 6, 6)
    assert names == ["blue", "red"]
    assert labels.tolist() == [0, 1]
    assert images[0, 2].min() == 1


@pytest.mark.parametrize("splits", [("train", "test"), ("everything",)])
def test_a_data_set_has_a_column_of_pictures_and_one_of_labels(
    splits: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(name: str) -> datasets.DatasetDict:
        asked.append(name)
        empty = table().select([])
        return datasets.DatasetDict({split: empty if split == "test" else table() for split in splits})

    monkeypatch.setattr(datasets, "load_dataset", load)
    images, labels, names = labelled_pictures("someone/pictures", 8)
    assert asked == ["someone/pictures"]
    assert names == ["rot", "weiß", "schwarz"]
    assert labels.tolist() == [0, 1, 2]
    assert torch.equal(images[:, :, 0, 0], torch.tensor([[1.0, 0, 0], [1, 1, 1], [0, 0, 0]]))


def test_a_data_set_without_labels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name: datasets.DatasetDict({"train": table().remove_columns("kind")})
    )
    with pytest.raises(DataError, match=r"no column of class labels \(ClassLabel\), but picture \(Image\)"):
        labelled_pictures("someone/pictures", 8)


def test_what_is_nowhere_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load(name: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match="no folder, and no Hugging Face data set of that name can be loaded: no netw"):
        labelled_pictures("someone/pictures", 8)
    with pytest.raises(DataError, match="There is no folder"):
        labelled_pictures(str(tmp_path / "none"), 8)
