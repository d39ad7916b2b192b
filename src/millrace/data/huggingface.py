"""Hugging Face data sets, recognised without importing their library."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import default_collate

from millrace.data.batches import Batch
from millrace.data.indexed import IndexedBatches, checked_batch_size
from millrace.data.iterables import IterableBatches
from millrace.data.nest import as_batch
from millrace.data.randomness import derived_seed, seeded_global_random
from millrace.errors import DataError


def kind_of(data: object) -> str | None:
    """ "Dataset", "IterableDataset" or "DatasetDict" (of either) if `data` is one of Hugging Face's, else None."""
    library = sys.modules.get("datasets")
    for kind in ("Dataset", "IterableDataset", "DatasetDict", "IterableDatasetDict"):
        type_ = getattr(library, kind, None)
        if isinstance(type_, type) and isinstance(data, type_):
            return kind.removeprefix("Iterable") if kind.endswith("Dict") else kind
    return None


def no_split_chosen(data: Any) -> DataError:
    """The error for a DatasetDict."""
    splits = [repr(name) for name in data]
    return DataError(
        f"A Hugging Face {type(data).__name__} holds several data sets ({', '.join(splits) or 'none'}), but one is "
        f"needed. Choose a split, such as data[{splits[0] if splits else 'name'}]."
    )


class TableBatches(IndexedBatches):
    """Batches (dicts of columns) of a Hugging Face Dataset, as tensors; own transforms (with_transform) are kept."""

    def __init__(self, table: Any, batch_size: int | None, *, shuffle: bool, seed: int, drop_last: bool) -> None:
        super().__init__("the Hugging Face Dataset", len(table), batch_size, shuffle, seed, drop_last)
        # A transform may draw random numbers; plain columns cannot.
        self.draws_global_random = table.format["type"] == "custom"
        self._table = table if table.format["type"] in ("custom", "torch") else _with_tensors(table)

    def _fetch(self, indices: Tensor, epoch: int | None, number: int) -> Batch:
        if self.draws_global_random:
            with seeded_global_random(derived_seed("read", self.seed, -1 if epoch is None else epoch, number)):
                columns = self._table[indices.tolist()]
        else:
            columns = self._table[indices.tolist()]
        return _checked_columns(columns, self.name)


class _Rows:
    """Iterates an IterableDataset in batches."""

    def __init__(self, rows: Any, batch_size: int, drop_last: bool) -> None:
        self._rows = rows
        self._batch_size = batch_size
        self._drop_last = drop_last

    def __iter__(self) -> Iterator[Any]:
        rows = []
        for row in self._rows:
            rows.append(row)
            if len(rows) == self._batch_size:
                yield self._collated(rows)
                rows = []
        if rows and not self._drop_last:
            yield self._collated(rows)

    def _collated(self, rows: list[Any]) -> Any:
        try:
            return default_collate(rows)
        except (TypeError, RuntimeError) as error:
            raise DataError(
                f"Rows of the Hugging Face IterableDataset cannot be put together into a batch: {error}. Make every "
                "column numbers of equal shape (pad or cut with .map, drop others with .select_columns)."
            ) from error


def row_batches(rows: Any, batch_size: int | None, *, seed: int, drop_last: bool) -> IterableBatches:
    """Batches of a Hugging Face IterableDataset (its own order; its `set_epoch` is called).

    Seeking reads from the front: the library's saved state loses what is in its shuffle buffers, so it would not
    continue exactly.
    """
    name = "the Hugging Face IterableDataset"
    size = checked_batch_size(name, sys.maxsize, batch_size, drop_last)
    tensors = rows.with_format("torch")
    return IterableBatches(
        lambda: iter(_Rows(tensors, size, drop_last)),
        name,
        seed,
        owners=[tensors],
        evaluate=lambda: iter(_Rows(rows.with_format("torch"), size, drop_last=False)),
    )


def _with_tensors(table: Any) -> Any:
    chosen = table.format
    return table.with_format("torch", columns=chosen["columns"], output_all_columns=chosen["output_all_columns"])


def _checked_columns(columns: Any, name: str) -> Batch:
    for column, values in columns.items():
        if isinstance(values, list):
            held = "words" if values and isinstance(values[0], str) else "rows of different shapes"
            raise DataError(
                f"{name}: column {column!r} holds {held}, which make no tensor. Turn it into numbers of equal shape "
                "(tokenize, pad) with .map, or leave it out with .remove_columns."
            )
    return as_batch(columns, name)
