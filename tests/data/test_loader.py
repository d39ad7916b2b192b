"""DataLoaders: workers, skipping without reading, and what users' own code sees."""

from __future__ import annotations

import itertools
import multiprocessing
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.data.kinds import Noisy, NoisyStream, tensors
from tests.data.test_batches import all_same, take
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    SequentialSampler,
    Subset,
    get_worker_info,
)

from millrace.data import Batches, as_batches
from millrace.errors import DataError


def with_workers(seed: int = 0, **options: Any) -> Batches:
    loader = DataLoader(Noisy(11), 2, shuffle=True, num_workers=2, **options)
    return as_batches(loader, seed=seed)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_give_what_no_workers_give_and_resume_exactly(persistent: bool) -> None:
    with as_batches(DataLoader(Noisy(11), 2, shuffle=True)) as alone:
        expected = take(alone, 14)
    with with_workers(persistent_workers=persistent) as batches:
        assert all_same(take(batches, 14), expected)
        batches.seek({**batches.position(), "epoch": 0, "batch": 3, "handed_out": 3})
        assert all_same(take(batches, 5), expected[3:8])


def test_workers_of_a_stream_resume_exactly() -> None:
    def make() -> Batches:
        return as_batches(DataLoader(NoisyStream(6), 2, num_workers=2), seed=1)

    with make() as whole:
        expected = take(whole, 8)
    with make() as resumed:
        resumed.seek({"epoch": 0, "batch": 4, "handed_out": 4})
        assert all_same(take(resumed, 4), expected[4:])


def test_closing_ends_the_workers_and_reading_may_go_on() -> None:
    with as_batches(DataLoader(Noisy(11), 2, shuffle=True)) as alone:
        expected = take(alone, 9)
    for persistent in (False, True):
        batches = with_workers(persistent_workers=persistent)
        before = take(batches, 4)
        assert len(multiprocessing.active_children()) == 2
        batches.close()
        assert not multiprocessing.active_children()
        assert all_same(before + take(batches, 5), expected)
        batches.close()


class Counting(Dataset[Any]):
    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        return torch.tensor(index)


def test_seeking_reads_no_skipped_example() -> None:
    dataset = Counting()
    batches = as_batches(DataLoader(dataset, 2, shuffle=True))
    batches.seek({"epoch": 3, "batch": 7, "handed_out": 37})
    rest = list(batches.until(epochs=4))
    assert dataset.read == torch.cat(rest).tolist()
    assert len(rest) == 3


class KnowsItsWorker(Dataset[Any]):
    """Opened by its worker, as data sets over files are."""

    handle: int | None = None

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        info = get_worker_info()
        assert info is not None
        assert info.dataset is self
        assert self.handle is not None
        return torch.tensor(self.handle)


def opened(worker: int) -> None:
    info = get_worker_info()
    assert info is not None
    info.dataset.handle = 7 + worker  # type: ignore[attr-defined]


def test_worker_init_fn_sees_the_users_data_set() -> None:
    with as_batches(DataLoader(KnowsItsWorker(), 1, num_workers=2, worker_init_fn=opened)) as batches:
        assert {int(batch) for batch in batches.until(epochs=1)} == {7, 8}


def test_an_error_in_a_worker_names_the_users_error() -> None:
    class Broken(Noisy):
        def __getitem__(self, index: int) -> Any:
            raise ZeroDivisionError("in the worker")

    with (
        as_batches(DataLoader(Broken(4), num_workers=1)) as batches,
        pytest.raises(ZeroDivisionError, match="in the worker"),
    ):
        batches.advance()


def test_ragged_examples_in_a_worker_are_a_data_error() -> None:
    loader = DataLoader([torch.ones(1), torch.ones(2)], 2, num_workers=1)  # type: ignore[arg-type]
    with as_batches(loader) as batches, pytest.raises(DataError, match="cannot be put together"):
        batches.advance()


def test_a_loader_of_tensors_gives_bit_for_bit_what_the_loader_gives() -> None:
    subset = Subset(Subset(tensors(9), range(2, 9)), [6, 0, 3, 3, 1])
    for dataset in (tensors(7), subset):
        loader = DataLoader(dataset, 3)
        assert all_same(list(as_batches(loader).until(epochs=1)), list(loader))


def test_a_collate_function_is_used() -> None:
    loader = DataLoader(tensors(4), 2, collate_fn=lambda rows: {"sum": sum(row[0] for row in rows)})
    assert [batch["sum"].shape for batch in as_batches(loader).until(epochs=1)] == [(2,), (2,)]


def test_a_loader_in_order_keeps_its_order() -> None:
    batches = list(as_batches(DataLoader(Counting(), 3)).until(epochs=1))
    assert torch.cat(batches).tolist() == list(range(20))


def test_set_epoch_of_a_sampler_is_called() -> None:
    sampler = DistributedSampler(Counting(), num_replicas=2, rank=0)
    batches = as_batches(DataLoader(Counting(), 2, sampler=sampler))
    epochs = [torch.cat(list(batches.until(epochs=n))).tolist() for n in (1, 2)]
    for epoch, read in enumerate(epochs):
        sampler.set_epoch(epoch)
        assert read == list(sampler)
    assert epochs[0] != epochs[1]


def test_evaluation_is_in_order_and_whole() -> None:
    loader = DataLoader(Counting(), 8, shuffle=True, drop_last=True)
    batches = as_batches(loader)
    assert batches.batches_per_epoch == 2
    assert torch.cat(list(batches.one_pass())).tolist() == list(range(20))
    stream = as_batches(DataLoader(NoisyStream(5), 2, drop_last=True))
    assert [len(batch[0]) for batch in stream.one_pass()] == [2, 2, 1]


class Endless:
    def __iter__(self) -> Iterator[int]:
        return itertools.cycle(range(3))


def test_an_endless_sampler_is_one_endless_epoch() -> None:
    batches = as_batches(DataLoader(Counting(), sampler=Endless()))
    assert batches.batches_per_epoch is None
    assert torch.cat(take(batches, 7)).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert torch.cat(list(itertools.islice(batches.one_pass(), 4))).tolist() == [0, 1, 2, 0]


class Doubling(DataLoader[Any]):
    """A loader with an iteration of its own."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield batch
            yield batch + torch.rand(1)


def test_a_subclass_with_its_own_iteration_keeps_it() -> None:
    def make() -> Batches:
        return as_batches(Doubling(Counting(), 5, shuffle=True), seed=2)

    expected = take(make(), 12)
    resumed = make()
    resumed.seek({"epoch": 0, "batch": 5, "handed_out": 5})
    assert all_same(take(resumed, 7), expected[5:])
    assert len(list(make().until(epochs=1))) == 8


def test_evaluation_does_not_disturb_a_sampler_that_is_halfway() -> None:
    class Choosing(BatchSampler):
        """Draws from its own generator for every batch."""

        def __init__(self) -> None:
            super().__init__(SequentialSampler(range(20)), 2, False)
            self.rng = np.random.default_rng(0)
            self.python = random.Random(0)

        def __iter__(self) -> Iterator[list[int]]:
            for _ in range(10):
                yield [int(self.rng.integers(20)), self.python.randrange(20)]

    expected = take(as_batches(DataLoader(Counting(), batch_sampler=Choosing())), 9)
    batches = as_batches(DataLoader(Counting(), batch_sampler=Choosing()))
    before = take(batches, 4)
    assert all_same(list(batches.one_pass()), list(batches.one_pass()))
    assert all_same(before + take(batches, 5), expected)
