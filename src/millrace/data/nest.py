"""Nested batches: finding their tensors, turning numpy arrays into tensors, and saying where something else hides."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from millrace.data.batches import Batch
from millrace.errors import DataError


def as_batch(value: object, source: str) -> Batch:
    """`value` as a batch: tensors stay themselves, numpy arrays become tensors that share their memory.

    Raises:
        DataError: something in it is neither, or there is nothing in it; names the place.
    """
    batch = _converted(value, source, "batch")
    if next(leaves(batch), None) is None:
        raise DataError(f"{source} gave an empty {type(value).__name__} as a batch, where at least one tensor must be.")
    return batch


def leaves(batch: Batch, where: str = "batch") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch with their places, such as ("batch['image']", tensor), in order."""
    if isinstance(batch, Tensor):
        yield where, batch
    elif isinstance(batch, Mapping):
        for key, part in batch.items():
            yield from leaves(part, f"{where}[{key!r}]")
    else:
        for index, part in enumerate(batch):
            yield from leaves(part, f"{where}[{index}]")


def map_leaves(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """The batch with `function` applied to every tensor."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_leaves(function, part) for key, part in batch.items()}
    return _rebuilt(batch, [map_leaves(function, part) for part in batch])


def _converted(value: object, source: str, where: str) -> Batch:
    if isinstance(value, Tensor):
        return value
    if hasattr(value, "__array__"):
        return tensor_from_numpy(np.asarray(value), source, where)
    if isinstance(value, Mapping):
        return {key: _converted(part, source, f"{where}[{key!r}]") for key, part in value.items()}
    if isinstance(value, tuple | list):
        return _rebuilt(value, [_converted(part, source, f"{where}[{i}]") for i, part in enumerate(value)])
    shown = repr(value)
    shown = shown if len(shown) <= 40 else shown[:37] + "..."
    raise DataError(
        f"{source}: {where} is {shown} (of type {type(value).__name__}), but a batch may hold only tensors (or numpy "
        "arrays), alone or in tuples, lists and dicts. Turn it into a tensor first, or leave it out."
    )


def _rebuilt(like: tuple[object, ...] | list[object], parts: list[Batch]) -> Batch:
    if isinstance(like, list):
        return parts
    return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)


def tensor_from_numpy(array: np.ndarray, source: str, where: str) -> Tensor:
    """The array as a tensor of the same dtype (float64 stays float64), sharing its memory where torch can.

    Raises:
        DataError: torch has no such dtype (strings, objects, dates).
    """
    if array.dtype.byteorder not in "=|" and array.dtype.kind in "iufc":
        array = array.astype(array.dtype.newbyteorder("="))
    if any(stride < 0 for stride in array.strides):
        array = np.ascontiguousarray(array)
    try:
        with warnings.catch_warnings():
            # Read-only arrays (memory maps) are fine: nothing here writes into them.
            warnings.filterwarnings("ignore", message=".*not writable.*")
            return torch.from_numpy(array)
    except TypeError as error:
        raise DataError(
            f"{source}: {where} is a numpy array of dtype {array.dtype}, which no tensor can hold. Convert it to "
            "numbers first (labels given as words: to their indices)."
        ) from error
