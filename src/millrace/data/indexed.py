"""Sources whose examples are numbered: every epoch is a permutation that follows from (seed, epoch)."""

from __future__ import annotations

import abc
from collections.abc import Iterator

import torch
from torch import Tensor

from millrace.data.batches import Batch, EpochBatches
from millrace.data.nest import as_batch, leaves, map_leaves
from millrace.data.randomness import generator_from
from millrace.errors import DataError

DEFAULT_BATCH_SIZE = 32


class IndexedBatches(EpochBatches):
    """Batches picked out of `count` numbered examples; seeking is arithmetic and reads nothing."""

    def __init__(
        self,
        name: str,
        count: int,
        batch_size: int | None,
        shuffle: bool,
        seed: int,
        drop_last: bool,
    ) -> None:
        """A batch size of None means 32, or all examples where there are fewer.

        Raises:
            DataError: there are no examples, or too few for one batch.
        """
        batch_size = checked_batch_size(name, count, batch_size, drop_last)
        super().__init__(
            name,
            {"examples": count, "batch_size": batch_size, "shuffle": shuffle, "seed": seed, "drop_last": drop_last},
        )
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self._shuffle = shuffle
        self._drop_last = drop_last

    @abc.abstractmethod
    def _fetch(self, indices: Tensor, epoch: int | None, number: int) -> Batch:
        """The batch of these examples: number `number` of an epoch, or (epoch None) of an evaluation pass."""

    @property
    def batches_per_epoch(self) -> int:
        return self.count // self.batch_size if self._drop_last else -(-self.count // self.batch_size)

    def _read_epoch(self, epoch: int, first: int) -> Iterator[Batch]:
        order = self._order(epoch)
        for number in range(first, self.batches_per_epoch):
            start = number * self.batch_size
            yield self._fetch(order[start : start + self.batch_size], epoch, number)

    def _order(self, epoch: int) -> Tensor:
        if not self._shuffle:
            return torch.arange(self.count)
        return torch.randperm(self.count, generator=generator_from("order", self.seed, epoch))

    def one_pass(self) -> Iterator[Batch]:
        order = torch.arange(self.count)
        for number, indices in enumerate(order.split(self.batch_size)):
            yield self._fetch(indices, None, number)


def checked_batch_size(name: str, count: int, batch_size: int | None, drop_last: bool) -> int:
    """The batch size to use for `count` examples (32 at most when none was asked for), or a DataError."""
    if count == 0:
        raise DataError(f"{name} is empty: there must be at least one example. Check where it was read from.")
    if batch_size is None:
        return min(DEFAULT_BATCH_SIZE, count)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise DataError(f"batch_size must be a whole number from 1 on, but {batch_size!r} was given for {name}.")
    if drop_last and batch_size > count:
        raise DataError(
            f"{name} has {count} examples, fewer than one batch of batch_size={batch_size}, and drop_last=True drops "
            f"short batches, so nothing would be left. Use batch_size={count} or less, or drop_last=False."
        )
    return batch_size


class ArrayBatches(IndexedBatches):
    """Batches out of tensors or numpy arrays, alone or nested, whose leading axes number the same examples.

    The whole data stays where it is (memory, memory map, or a device), and each batch gathers its rows there.
    """

    draws_global_random = False

    def __init__(
        self,
        arrays: object,
        batch_size: int | None,
        *,
        shuffle: bool,
        seed: int,
        drop_last: bool,
        name: str = "the arrays",
    ) -> None:
        """Raises DataError where leaves are no arrays, or differ in length."""
        self._columns: Batch = map_leaves(lambda column: column.detach(), as_batch(arrays, name))
        super().__init__(name, _common_length(self._columns, name), batch_size, shuffle, seed, drop_last)

    def _fetch(self, indices: Tensor, epoch: int | None, number: int) -> Batch:
        return map_leaves(lambda column: column.index_select(0, indices.to(column.device)), self._columns)


def _common_length(columns: Batch, name: str) -> int:
    lengths: dict[str, int] = {}
    for where, column in leaves(columns, "data"):
        if column.ndim == 0:
            raise DataError(
                f"{name}: {where} is a single number, but each array's first axis must number the examples. "
                "Give one row per example."
            )
        lengths[where] = len(column)
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{where} has {length}" for where, length in lengths.items())
        raise DataError(
            f"{name} must all have the same length along the first axis (one row per example), but {shown}. "
            "Give equally long arrays; a list (not a tuple) of tensors is taken as ready batches."
        )
    return next(iter(lengths.values()))
