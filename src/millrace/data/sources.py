"""`as_batches`: whatever a user hands in as data becomes one kind of source."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from millrace.data.batches import Batches
from millrace.data.examples import ExampleBatches
from millrace.data.huggingface import TableBatches, kind_of, no_split_chosen, row_batches
from millrace.data.images import ImageFolder
from millrace.data.indexed import ArrayBatches, checked_batch_size
from millrace.data.iterables import IterableBatches, OnceBatches, StatefulBatches
from millrace.data.loader import LoaderBatches, reads_by_index
from millrace.errors import DataError


def as_batches(
    data: object, *, batch_size: int | None = None, shuffle: bool = True, seed: int = 0, drop_last: bool = True
) -> Batches:
    """Any data as one resumable stream of batches.

    | data | batches |
    |---|---|
    | Batches | itself |
    | tensor, numpy array; tuple or dict (nested) of them | rows of each; every epoch its own permutation |
    | ImageFolder | (images, labels), likewise |
    | map-style Dataset; Hugging Face Dataset; list of examples, with `batch_size` | collated; likewise |
    | DataLoader, StatefulDataLoader | its own; shuffling and augmentation follow from (seed, epoch) |
    | IterableDataset of torch or Hugging Face | its examples in their own order, collated |
    | list or other iterable of batches, or a function that makes a fresh iterator | its own; each pass is an epoch |
    | generator or other one-shot iterator | its own, for a single epoch |

    Args:
        data: see the table.
        batch_size: examples per batch, for data that comes as examples: 32 (or all, if fewer) unless given.
        shuffle: whether numbered examples are permuted; data that has an order of its own keeps that.
        seed: what every random choice follows from.
        drop_last: whether an epoch leaves out its last, short batch, for data that comes as examples.

    Raises:
        DataError: the data is of no such kind, is empty, or does not fit the settings.
    """
    if isinstance(data, Batches):
        return _ready(data, batch_size, "Batches")
    if isinstance(data, str | bytes | Path):
        raise DataError(
            f"The data is {data!r}, of type {type(data).__name__}, but must be data itself. Read it first, for a "
            "directory of images with image_folder(directory)."
        )
    options: dict[str, Any] = {"shuffle": shuffle, "seed": seed, "drop_last": drop_last}
    from_library = _from_library(data, batch_size, options)
    if from_library is not None:
        return from_library
    if isinstance(data, ImageFolder):
        return ArrayBatches((data.images, data.labels), batch_size, name="the image folder", **options)
    if hasattr(data, "__array__") and not isinstance(data, type):  # also tables of pandas and the like
        return ArrayBatches(data, batch_size, name="the array", **options)
    if isinstance(data, tuple | Mapping):
        return ArrayBatches(data, batch_size, **options)
    return _from_python(data, batch_size, options)


def _from_library(data: Any, batch_size: int | None, options: dict[str, Any]) -> Batches | None:
    """Data sets and loaders of torch, torchdata and Hugging Face."""
    seed, drop_last = options["seed"], options["drop_last"]
    hugging_face = kind_of(data)
    if hugging_face == "DatasetDict":
        raise no_split_chosen(data)
    if hugging_face == "Dataset":
        return TableBatches(data, batch_size, **options)
    if hugging_face == "IterableDataset":
        return row_batches(data, batch_size, seed=seed, drop_last=drop_last)
    if isinstance(data, DataLoader):
        return _ready(_from_loader(data, seed), batch_size, "a DataLoader")
    if isinstance(data, IterableDataset):
        size = checked_batch_size(_called(data), sys.maxsize, batch_size, drop_last)
        return _from_loader(DataLoader(data, size, drop_last=drop_last), seed, _called(data))
    return None


def _from_loader(loader: DataLoader[Any], seed: int, name: str = "the DataLoader") -> Batches:
    if reads_by_index(loader):
        return LoaderBatches(loader, seed)
    owners = [loader, loader.dataset]
    trusted = kind_of(loader.dataset) is None and hasattr(loader.dataset, "state_dict")
    if trusted and hasattr(loader, "load_state_dict"):
        return StatefulBatches(loader, name, seed, owners)
    return IterableBatches(lambda: iter(loader), name, seed, owners=owners, evaluate=lambda: iter(_whole(loader)))


def _whole(loader: DataLoader[Any]) -> Iterable[Any]:
    """The loader of an IterableDataset with its last batch kept; any other as it is."""
    if type(loader) is not DataLoader or loader.batch_size is None:
        return loader
    return DataLoader(
        loader.dataset,
        loader.batch_size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if loader.num_workers else None,
        drop_last=False,
    )


def _from_python(data: Any, batch_size: int | None, options: dict[str, Any]) -> Batches:
    """Anything that Python can index, iterate or call."""
    name, seed = _called(data), options["seed"]
    made = not isinstance(data, type)  # a class is a function that makes one
    iterable = made and hasattr(data, "__iter__")
    indexable = made and hasattr(data, "__getitem__")
    if indexable and (batch_size is not None or not iterable):
        return ExampleBatches(data, batch_size, name=name, **options)
    if hasattr(data, "state_dict") and hasattr(data, "load_state_dict") and iterable:
        return _ready(StatefulBatches(data, name, seed, [data]), batch_size, name)
    if isinstance(data, Iterator):
        return _ready(OnceBatches(data, name, seed), batch_size, name)
    if iterable:
        length = len(data) if isinstance(data, Sequence) else None
        if length == 0:
            raise DataError(f"{name} is empty: there must be at least one batch. Check where it was read from.")
        fresh: Callable[[], Iterator[Any]] = lambda: iter(data)  # noqa: E731
        return _ready(IterableBatches(fresh, name, seed, owners=[data], batches_per_epoch=length), batch_size, name)
    if callable(data):
        return _ready(IterableBatches(lambda: _fresh(data, name), name, seed), batch_size, name)
    raise DataError(
        f"Data of type {type(data).__name__} cannot be read: give tensors or numpy arrays (alone, or in a tuple or "
        "dict), a torch Dataset or DataLoader, a Hugging Face data set, an iterable of batches, or a function that "
        "returns a fresh iterator of batches."
    )


def _fresh(make: Callable[[], Any], name: str) -> Iterator[Any]:
    made = make()
    try:
        return iter(made)
    except TypeError as error:
        raise DataError(
            f"{name} must return an iterator of batches each time it is called, but returned an object of type "
            f"{type(made).__name__}. Write it as a generator function (with yield)."
        ) from error


def _called(data: Any) -> str:
    return f"the {type(data).__name__} {getattr(data, '__name__', '')}".rstrip()


def _ready(batches: Batches, batch_size: int | None, what: str) -> Batches:
    if batch_size is not None:
        raise DataError(
            f"batch_size={batch_size} was given, but {what} already comes in batches. Leave batch_size out, or hand "
            "in the examples themselves."
        )
    return batches
