"""torch DataLoaders: their own order, workers and collation, made repeatable and cheap to resume.

The loader is rebuilt around the same data set so that each request to read carries the seed of its batch. Random
augmentations then depend on (seed, epoch, number of the batch) only, not on which worker read what before, and a
resumed epoch asks the sampler for the skipped indices without reading them.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from millrace.data.batches import Batch, EpochBatches
from millrace.data.examples import SeededReads
from millrace.data.nest import as_batch
from millrace.data.randomness import (
    derived_seed,
    follow_epoch,
    global_random_kept,
    own_generators_kept,
    seed_global_random,
    seeded_global_random,
)
from millrace.errors import DataError


def reads_by_index(loader: DataLoader[Any]) -> bool:
    """Whether the loader picks numbered examples, by DataLoader's own iteration (a subclass may have another)."""
    stateful = sys.modules.get("torchdata.stateful_dataloader")
    known = [DataLoader.__iter__] + ([stateful.StatefulDataLoader.__iter__] if stateful is not None else [])
    return type(loader).__iter__ in known and not isinstance(loader.dataset, IterableDataset)


@dataclass(frozen=True)
class _Request:
    """One batch to read; `index` is a list of indices, or one index of a data set that holds whole batches."""

    index: Any
    seed: int


class _Requests:
    """The sampler of the rebuilt loader: the user's own order from batch `first` of `epoch` on, with seeds."""

    def __init__(self, order: Iterable[Any], owners: list[object], seed: int) -> None:
        self._order = order
        self._owners = owners
        self._seed = seed
        self.epoch, self.first = 0, 0

    def __iter__(self) -> Iterator[_Request]:
        epoch, first = self.epoch, self.first
        follow_epoch(self._owners, epoch, self._seed)
        seed_global_random(derived_seed("order", self._seed, epoch))
        indices = iter(self._order)
        for number in itertools.count():
            # In-process reads draw from the global generators between two indices, and skipped ones do not: seeding
            # for every index makes a sampler that draws as it goes independent of the reads.
            seed_global_random(derived_seed("order", self._seed, epoch, number))
            try:
                index = next(indices)
            except StopIteration:
                return
            if number >= first:
                yield _Request(index, derived_seed("read", self._seed, epoch, number))


class _Reads(Dataset[Any]):
    """The data set of the rebuilt loader: reads and collates the batch of a request, in whatever process it lives."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.dataset = loader.dataset
        self._reads = SeededReads(loader.dataset, loader.collate_fn)
        self._batched = loader.batch_sampler is not None

    def __getitem__(self, request: _Request) -> Any:
        read = self._reads.read if self._batched else self._reads.read_one
        return read(request.index, request.seed)


class _WorkerStart:
    """Runs the user's worker_init_fn as in the original loader: get_worker_info().dataset is the user's data set."""

    def __init__(self, users: Callable[[int], None] | None) -> None:
        self._users = users

    def __call__(self, worker: int) -> None:
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, _Reads):
            object.__setattr__(info, "dataset", info.dataset.dataset)  # a frozen dataclass
        if self._users is not None:
            self._users(worker)


def _as_read(batch: Any) -> Any:
    return batch


class LoaderBatches(EpochBatches):
    """The batches of a DataLoader over a map-style data set."""

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        """Raises DataError where an epoch of the loader has no batch."""
        self._batches_per_epoch = _length(loader)
        super().__init__("the DataLoader", {"batches_per_epoch": self._batches_per_epoch, "seed": seed})
        if self._batches_per_epoch == 0:
            raise DataError(_why_empty(loader))
        self._users = loader
        self._seed = seed
        order = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
        self._owners = _owners(loader)
        self._requests = _Requests(order, [*self._owners, loader.dataset], seed)
        self._loader: DataLoader[Any] | None = None  # rebuilt; kept over epochs for its persistent workers

    @property
    def batches_per_epoch(self) -> int | None:
        return self._batches_per_epoch

    def _read_epoch(self, epoch: int, first: int) -> Iterator[Batch]:
        self._requests.epoch, self._requests.first = epoch, first
        if self._loader is None:
            self._loader = _rebuilt(self._users, self._requests, self._users.persistent_workers)
        return self._read(self._loader, derived_seed("workers", self._seed, epoch))

    def _read(self, loader: DataLoader[Any], seed: int) -> Iterator[Batch]:
        with seeded_global_random(seed):
            batches = iter(loader)
        try:
            while True:
                with global_random_kept():
                    try:
                        batch = next(batches)
                    except StopIteration:
                        return
                yield as_batch(batch, self.name)
        finally:
            if not loader.persistent_workers:
                _end_workers(batches)

    def one_pass(self) -> Iterator[Batch]:
        with own_generators_kept(self._owners), global_random_kept():
            order = self._order_for_evaluation()
        loader = _rebuilt(self._users, _Requests(order, [], self._seed), persistent_workers=False)
        yield from self._read(loader, self._seed)

    def close(self) -> None:
        super().close()
        self._loader = None  # which ends persistent workers

    def _order_for_evaluation(self) -> Iterable[Any]:
        """Batches of indices without shuffling where the sampler is torch's own; else in the sampler's first order."""
        seed_global_random(derived_seed("order", self._seed, "evaluation"))
        follow_epoch(self._owners, 0, self._seed)
        users = self._users
        if users.batch_size is None or self._batches_per_epoch is None:
            order = users.batch_sampler if users.batch_sampler is not None else users.sampler
            # Listed now, while its generators are borrowed, unless it may have no end.
            return order if self._batches_per_epoch is None else list(order)
        indices = _unshuffled(users.sampler, users.dataset)
        return [indices[start : start + users.batch_size] for start in range(0, len(indices), users.batch_size)]


def _unshuffled(sampler: Iterable[Any], dataset: Any) -> list[Any]:
    if isinstance(sampler, SubsetRandomSampler):
        return list(sampler.indices)
    # By name as well: torchdata has a RandomSampler of its own.
    if isinstance(sampler, RandomSampler | WeightedRandomSampler) or type(sampler).__name__ == "RandomSampler":
        return list(range(len(dataset)))
    return list(sampler)


def _rebuilt(loader: DataLoader[Any], requests: _Requests, persistent_workers: bool) -> DataLoader[Any]:
    workers: dict[str, Any] = {}
    if loader.num_workers > 0:
        workers = {
            "prefetch_factor": loader.prefetch_factor,
            "persistent_workers": persistent_workers,
            "multiprocessing_context": loader.multiprocessing_context,
            "worker_init_fn": _WorkerStart(loader.worker_init_fn),
        }
    return DataLoader(
        _Reads(loader),
        sampler=requests,
        batch_size=None,
        collate_fn=_as_read,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        **workers,
    )


def _end_workers(batches: object) -> None:
    """End the workers now: an error's traceback would keep the iterator, and so its processes, alive."""
    end = getattr(batches, "_shutdown_workers", None)  # torch offers no public way; without it they end some time later
    if end is not None:
        end()


def _owners(loader: DataLoader[Any]) -> list[object]:
    """What may hold the generators that shuffle, or wait for set_epoch."""
    inner = getattr(loader.batch_sampler, "sampler", None)
    distinct: list[object] = []
    for owner in (loader.sampler, loader.batch_sampler, inner):
        if owner is not None and not any(owner is known for known in distinct):
            distinct.append(owner)
    return distinct


def _length(loader: DataLoader[Any]) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):  # the sampler has no length
        return None


def _why_empty(loader: DataLoader[Any]) -> str:
    dataset: Any = loader.dataset
    try:
        count = len(dataset)
    except TypeError:
        count = None
    if count == 0:
        return "The DataLoader's data set is empty: there must be at least one example. Check where it was read from."
    batch_size = getattr(loader.batch_sampler, "batch_size", loader.batch_size)
    if getattr(loader.batch_sampler, "drop_last", False):
        return (
            f"The DataLoader's sampler gives fewer examples than one batch of batch_size={batch_size} (the data set "
            f"has {count}), and drop_last=True drops short batches, so nothing would be left. Use a smaller batch "
            "size, or drop_last=False."
        )
    return f"The DataLoader's sampler picks none of the {count} examples: at least one is needed. Check the sampler."
