"""Data sets that give one example at a time (`data[i]`), read in such a way that any batch can be read again alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset, default_collate

from millrace.data.batches import Batch
from millrace.data.indexed import IndexedBatches
from millrace.data.nest import as_batch
from millrace.data.randomness import derived_seed, reseed_own_generators, seed_global_random, seeded_global_random
from millrace.errors import DataError


class SeededReads:
    """Reads numbered examples of a data set under a seed, so that their random augmentations repeat exactly.

    A read leaves the global generators seeded: callers in the user's own process restore them; workers need not.
    """

    def __init__(self, dataset: Any, collate: Callable[[Any], Any] = default_collate) -> None:
        self.dataset = dataset
        self._collate = collate
        # Rows of plain tensors need no Python per example: one gather gives what collating them one by one would.
        self._columns = _tensor_columns(dataset) if collate is default_collate else None

    @property
    def is_random(self) -> bool:
        """Whether reading may draw random numbers (plain tensors cannot)."""
        return self._columns is None

    def read(self, indices: Sequence[Any], seed: int) -> Any:
        """The collated batch of the examples with these indices."""
        if self._columns is not None:
            columns, rows = self._columns
            index = torch.as_tensor(indices)
            index = index if rows is None else rows[index]
            return [column[index] for column in columns]
        self._seed(seed)
        many = getattr(self.dataset, "__getitems__", None)
        examples = many(list(indices)) if callable(many) else [self.dataset[index] for index in indices]
        return self._collated(examples)

    def read_one(self, index: Any, seed: int) -> Any:
        """What the data set has under one index, for data sets that hold whole batches."""
        self._seed(seed)
        return self._collate(self.dataset[index])

    def _collated(self, examples: Any) -> Any:
        if self._collate is not default_collate:
            return self._collate(examples)
        try:
            return default_collate(examples)
        except (TypeError, RuntimeError) as error:
            raise DataError(
                f"Examples of {type(self.dataset).__name__} cannot be put together into a batch: {error}. Give tensors "
                "of equal shapes per example, or a DataLoader with a collate_fn that pads them."
            ) from error

    def _seed(self, seed: int) -> None:
        seed_global_random(seed)
        reseed_own_generators(self.dataset, seed)


def _tensor_columns(dataset: Any) -> tuple[tuple[Tensor, ...], Tensor | None] | None:
    """The tensors behind a TensorDataset, or behind a Subset of one with the rows it selects; None for others."""
    if type(dataset) is TensorDataset:
        return dataset.tensors, None
    if type(dataset) is Subset:
        inner = _tensor_columns(dataset.dataset)
        if inner is not None:
            columns, rows = inner
            index = torch.as_tensor(dataset.indices)
            return columns, index if rows is None else rows[index]
    return None


class ExampleBatches(IndexedBatches):
    """Batches out of anything with `len(data)` and `data[i]`, put together by torch's default_collate."""

    def __init__(
        self, dataset: Any, batch_size: int | None, *, shuffle: bool, seed: int, drop_last: bool, name: str
    ) -> None:
        """Raises DataError where the data set has no length or too few examples."""
        try:
            count = len(dataset)
        except TypeError as error:
            raise DataError(
                f"{name} has no length, so its examples cannot be shuffled. Give it a __len__, or wrap it in a "
                "DataLoader with a sampler."
            ) from error
        super().__init__(name, count, batch_size, shuffle, seed, drop_last)
        self._reads = SeededReads(dataset)
        self.draws_global_random = self._reads.is_random

    def _fetch(self, indices: Tensor, epoch: int | None, number: int) -> Batch:
        seed = derived_seed("read", self.seed, -1 if epoch is None else epoch, number)
        if not self._reads.is_random:
            return self._reads.read(indices.tolist(), seed)
        with seeded_global_random(seed):
            batch = self._reads.read(indices.tolist(), seed)
        return as_batch(batch, self.name)
