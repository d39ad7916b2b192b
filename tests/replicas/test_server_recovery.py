"""Shards that are killed under load: what was acknowledged is there, once.

Every push adds one to every element, so a variable is the number of pushes applied to it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.replicas.counting import connected
from tests.replicas.shard_process import ChildProcess, ShardProcess, push_for_ever

from millrace.errors import WorkerError
from millrace.replicas.shard_clients import ShardClients

SIZE = 50_000
SERVES_AGAIN_S = 2.0  # what users want


class Load(threading.Thread):
    """A worker that pushes ones to two shards until it is told to stop; it moves when shard 0 has."""

    def __init__(self, number: int, addresses: list[str], moved: threading.Event, to: str) -> None:
        super().__init__(daemon=True)
        self.number, self.moved, self.to = number, moved, to
        self.shards = ShardClients([connected(a, f"w{number}", timeout_s=20) for a in addresses])
        self.last_step = 10**9
        self.pushes = 0
        self.moved_at_s = 0.0
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            self._steps()
        except BaseException as error:
            self.failure = error

    def _steps(self) -> None:
        into, ones, step = {"a": torch.empty(SIZE)}, {"a": torch.ones(SIZE)}, 0
        while step < self.last_step:
            versions = self._doing(lambda step=step: self.shards.fetch(into, step))
            self._doing(
                lambda step=step, versions=versions: self.shards.push(ones, step + 1, step, versions, slice=self.number)
            )
            step += 1
            self.pushes = step
        self.shards.close()

    def _doing(self, call: Any) -> Any:
        try:
            return call()
        except WorkerError:
            if self.moved_at_s or not self.moved.wait(20.0):
                raise
            self.shards.clients[0].move_to(self.to)
            found = self.shards.go_on()
            self.moved_at_s = time.monotonic()
            return found


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[list[ShardProcess]]:
    """shard 0, its copy, shard 1; made by `start`."""
    made: list[ShardProcess] = []
    yield made
    for process in made:
        process.kill()


def start(made: list[ShardProcess], directory: Path, needed: int) -> tuple[ShardProcess, ShardProcess, ShardProcess]:
    for name, copy in (("0", False), ("copy", True), ("1", False)):
        made.append(ShardProcess(directory, name, SIZE, needed, copy=copy))
    for process in made:
        assert process.wait() == "ok"
    first, copy, second = made
    first.tell(attach=copy.address)
    return first, copy, second


def content(process: ShardProcess) -> float:
    """The number that every element is."""
    into = {"a": torch.empty(SIZE)}
    with connected(process.address, "reader") as reader:
        reader.fetch(into)
    assert float(into["a"].min()) == float(into["a"].max())
    return float(into["a"][0])


def run_until(loads: list[Load], step: int) -> None:
    deadline_s = time.monotonic() + 30.0
    while min(load.pushes for load in loads) < step:
        for load in loads:
            if load.failure is not None:
                raise load.failure
        assert time.monotonic() < deadline_s, "the workers do not get on"
        time.sleep(0.002)


def end(loads: list[Load]) -> int:
    """Let all take the same steps. Returns: how many pushes there were."""
    last = max(load.pushes for load in loads) + 5
    for load in loads:
        load.last_step = last
    for load in loads:
        load.join(30.0)
        assert not load.is_alive()
        if load.failure is not None:
            raise load.failure
    return sum(load.pushes for load in loads)


@pytest.mark.parametrize("needed", [0, 2], ids=["async", "sync"])
def test_a_killed_shard_is_taken_over_by_its_copy(needed: int, processes: list[ShardProcess], tmp_path: Path) -> None:
    first, copy, second = start(processes, tmp_path, needed)
    moved = threading.Event()
    loads = [Load(i, [first.address, second.address], moved, copy.address) for i in range(2)]
    for load in loads:
        load.start()
    run_until(loads, 50)
    killed_s = time.monotonic()
    first.kill()
    copy.tell(promote=True)
    moved.set()
    run_until(loads, max(load.pushes for load in loads) + 20)
    pushes = end(loads)
    assert max(load.moved_at_s for load in loads) - killed_s < SERVES_AGAIN_S
    applied = pushes / 2 if needed else pushes  # in sync mode a step adds the mean of two ones
    assert content(copy) == content(second) == applied


def test_a_killed_copy_stops_nobody(processes: list[ShardProcess], tmp_path: Path) -> None:
    first, copy, second = start(processes, tmp_path, 0)
    loads = [Load(i, [first.address, second.address], threading.Event(), "") for i in range(2)]
    for load in loads:
        load.start()
    run_until(loads, 50)
    copy.kill()
    run_until(loads, max(load.pushes for load in loads) + 20)
    assert end(loads) == content(first) == content(second)


def test_the_new_shard_gets_a_copy_under_load_and_is_lost_too(processes: list[ShardProcess], tmp_path: Path) -> None:
    first, copy, second = start(processes, tmp_path, 0)
    third = ShardProcess(tmp_path, "third", SIZE, copy=True)
    processes.append(third)
    third.wait()
    addresses = [first.address, second.address]
    moved = threading.Event()
    loads = [Load(i, addresses, moved, copy.address) for i in range(2)]
    for load in loads:
        load.start()
    run_until(loads, 20)
    first.kill()
    copy.tell(promote=True)
    moved.set()
    run_until(loads, max(load.pushes for load in loads) + 20)
    copy.tell(attach=third.address)
    run_until(loads, max(load.pushes for load in loads) + 20)
    moved.clear()
    for load in loads:
        load.to, load.moved_at_s = third.address, 0.0
    copy.kill()
    third.tell(promote=True)
    moved.set()
    run_until(loads, max(load.pushes for load in loads) + 20)
    assert end(loads) == content(third) == content(second)


def test_a_worker_killed_while_it_pushes_harms_nobody(processes: list[ShardProcess], tmp_path: Path) -> None:
    process = ShardProcess(tmp_path, "0", SIZE)
    processes.append(process)
    process.wait()
    worker = ChildProcess(push_for_ever, process.address, SIZE)
    acknowledged = [worker.wait() for _ in range(20)]
    worker.kill()
    last = max([*acknowledged, *worker.rest()])
    assert last <= content(process) <= last + 1
    assert os.listdir(tmp_path) == ["0"]
