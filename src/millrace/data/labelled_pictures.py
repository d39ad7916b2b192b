"""A user's own labelled pictures by one word: a folder with a subfolder for each class, or a Hugging Face data set."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from millrace.data.images import image_folder
from millrace.data.split import holdout
from millrace.errors import DataError, did_you_mean

Labelled: TypeAlias = tuple[Tensor, Tensor]  # images float32 [n, 3, H, W] from 0 to 1, labels int64 [n]
_TEST, _VALIDATION, _SPLIT_SEED = 0.2, 0.1, 0  # which are held out never changes


def split_pictures(source: str, side: int) -> tuple[list[Labelled], list[str]]:
    """Those of `labelled_pictures` for training, validation and test, of each class alike; and the classes' names."""
    images, labels, names = labelled_pictures(source, side)
    rest, test = holdout(len(labels), _TEST, seed=_SPLIT_SEED, labels=labels)
    inner = holdout(len(rest), _VALIDATION, seed=_SPLIT_SEED, labels=labels[rest])
    return [(images[rows], labels[rows]) for rows in (rest[inner.train], rest[inner.held_out], test)], names


def of_classes(pictures: Labelled, kept: Sequence[int]) -> Labelled:
    """The pictures of these classes, whose labels are numbered anew in the order given."""
    images, before = pictures
    labels = torch.full_like(before, -1)
    for number, label in enumerate(kept):
        labels[before == label] = number
    return images[labels >= 0], labels[labels >= 0]


def first_of_each(pictures: Labelled, count: int) -> Labelled:
    """The first `count` pictures of every class, or all where there are fewer."""
    images, labels = pictures
    rows = torch.cat([(labels == label).nonzero()[:count, 0] for label in labels.unique()])
    return images[rows], labels[rows]


def labelled_pictures(source: str, side: int) -> tuple[Tensor, Tensor, list[str]]:
    """All pictures, scaled to squares.

    Args:
        source: a folder, or the name of a data set with a column of pictures and one of class labels; of several splits
            "train" is read.
        side: in pixels.

    Returns: float32 [n, 3, side, side] from 0 to 1; int64 [n], indices into the classes; the classes' names.

    Raises: DataError for a name that is neither, and for pictures that cannot be read.
    """
    if Path(source).exists():
        folder = image_folder(source, side, side, 3)
        return folder.images, folder.labels, folder.classes
    return _from_table(_loaded(source), source, side)


def _loaded(name: str) -> Any:
    """The data set of Hugging Face with this name."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(f"There is no folder {name}. Check the path.")
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"There is no folder {name}, and to look for a Hugging Face data set of that name, the package datasets is "
            "needed: pip install datasets."
        ) from error
    try:
        splits = library.load_dataset(name)
    except Exception as error:  # of many kinds, according to what the library uses to fetch
        raise DataError(
            f"{name} is no folder, and no Hugging Face data set of that name can be loaded: {error}. Give a folder "
            "with one subfolder of pictures for each class, or check the name."
        ) from error
    return splits["train"] if "train" in splits else next(iter(splits.values()))


def _from_table(table: Any, name: str, side: int) -> tuple[Tensor, Tensor, list[str]]:
    pictures = _only_column(table, name, "Image", "pictures")
    labels = _only_column(table, name, "ClassLabel", "class labels")
    images = torch.from_numpy(np.stack(list(_pixels(table, pictures, side)))).to(torch.float32) / 255
    return images, torch.tensor(table[labels][:], dtype=torch.int64), list(table.features[labels].names)


def _only_column(table: Any, name: str, kind: str, what: str) -> str:
    """The column of this kind, the first where there are several (coarse labels beside fine ones)."""
    kinds = {column: type(feature).__name__ for column, feature in table.features.items()}
    for column, found in kinds.items():
        if found == kind:
            return column
    columns = ", ".join(f"{column} ({found})" for column, found in kinds.items())
    raise DataError(
        f"The data set {name} has no column of {what} ({kind}), but {columns or 'none at all'}. "
        + did_you_mean(kind, list(kinds))
    )


def _pixels(table: Any, column: str, side: int) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    for index in range(len(table)):
        picture = table[index][column].convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
        yield np.ascontiguousarray(np.asarray(picture, dtype=np.uint8).transpose(2, 0, 1))
