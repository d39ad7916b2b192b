"""Reading ahead: never further than allowed, never in the way, and never left running."""

from __future__ import annotations

import gc
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.data.test_batches import all_same, take

from millrace.data import Batches, as_batches, mapped, prefetched
from millrace.errors import DataError


def source(watch: Callable[[], None] = lambda: None) -> Batches:
    def function(batch: Any, generator: torch.Generator) -> Any:
        watch()
        return batch, torch.rand(1, generator=generator)

    return mapped(as_batches(torch.arange(10), batch_size=3, drop_last=False), function)


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "millrace-prefetch"]


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_the_same_batches_epochs_and_positions(depth: int) -> None:
    plain = source()
    with prefetched(source(), depth) as ahead:
        for _ in range(11):
            first, second = plain.advance(), ahead.advance()
            assert (first is None) == (second is None)
            assert first is None or all_same([first], [second])
            assert ahead.position() == plain.position()
            assert (ahead.epoch, ahead.handed_out) == (plain.epoch, plain.handed_out)


def test_it_reads_ahead_as_far_as_allowed_and_no_further() -> None:
    reads: list[int] = []
    with prefetched(source(lambda: reads.append(1)), 2) as batches:
        batches.advance()
        assert wait_until(lambda: len(reads) == 4)  # one handed out, two in the queue, one waiting for room
        time.sleep(0.05)
        assert len(reads) == 4
        assert batches.handed_out == 1


def test_an_error_comes_at_its_batch_with_its_traceback() -> None:
    count = 0

    def fail_at_the_third() -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise ZeroDivisionError("third")

    with prefetched(source(fail_at_the_third), 4) as batches:
        assert len([batches.advance(), batches.advance()]) == 2
        with pytest.raises(ZeroDivisionError, match="third") as caught:
            batches.advance()
        assert "fail_at_the_third" in "".join(traceback.format_tb(caught.value.__traceback__))
        assert batches.handed_out == 2
        assert not running()


def test_closing_ends_the_thread_and_loses_no_batch() -> None:
    expected = take(source(), 9)
    batches = prefetched(source(), 3)
    before = take(batches, 4)
    batches.close()
    assert not running()
    assert batches.handed_out == 4
    assert all_same(before + take(batches, 5), expected)
    batches.close()
    assert not running()


def test_a_forgotten_reader_ends_by_itself() -> None:
    batches = prefetched(source(), 2)
    batches.advance()
    assert running()
    del batches
    gc.collect()
    assert wait_until(lambda: not running())


def test_evaluation_and_seeking_stop_reading_ahead() -> None:
    expected = take(source(), 9)
    with prefetched(source(), 3) as batches:
        take(batches, 4)
        position = batches.position()
        assert len(list(batches.one_pass())) == 4
        take(batches, 3)
        batches.seek(position)
        assert all_same(take(batches, 5), expected[4:])


def test_sources_with_global_randomness_stay_in_the_foreground() -> None:
    batches = as_batches([torch.ones(1)])
    with pytest.warns(UserWarning, match="read in the foreground"):
        assert prefetched(batches) is batches


def test_the_depth_must_be_positive() -> None:
    with pytest.raises(DataError, match="depth must be"):
        prefetched(source(), 0)
