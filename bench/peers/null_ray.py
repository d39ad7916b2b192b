"""Null steps with a plain parameter server of Ray actors that exchange NumPy arrays. `bench.null_step` starts it.

Also says what Ray costs: seconds to start, processes and their memory, microseconds of an actor call.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray

from bench.peers.null_common import ROW_WIDTH, answer

RATE = np.float32(0.1)


@ray.remote(num_cpus=0)
class Shard:
    """Some of the variables."""

    def __init__(self, task: dict[str, Any]) -> None:
        count = max(1, task["size_bytes"] // task["shards"] // 4)
        self.rows = task["case"] == "rows"
        self.value = np.zeros((count // ROW_WIDTH, ROW_WIDTH) if self.rows else count, np.float32)

    def fetch(self, rows: np.ndarray | None = None) -> np.ndarray:
        return self.value if rows is None else self.value[rows]

    def push(self, gradient: np.ndarray, rows: np.ndarray | None = None) -> None:
        if rows is None:
            self.value -= RATE * gradient
        else:
            np.subtract.at(self.value, rows, RATE * gradient)

    def nothing(self) -> None:
        pass


@ray.remote(num_cpus=0)
class Worker:
    """Takes null steps."""

    def __init__(self, task: dict[str, Any], shards: list[Any], number: int) -> None:
        self.shards, self.task = shards, task
        self.random = np.random.default_rng(number)
        self.total_rows = task["size_bytes"] // task["shards"] // (4 * ROW_WIDTH)
        self.zeros: list[np.ndarray] | None = None

    def run(self, steps: int) -> float:
        start_s = time.perf_counter()
        for _ in range(steps):
            if self.task["case"] == "rows":
                self._rows()
            else:
                self._dense()
        return time.perf_counter() - start_s

    def _dense(self) -> None:
        values = ray.get([shard.fetch.remote() for shard in self.shards])
        if self.zeros is None:
            self.zeros = [np.zeros_like(value) for value in values]
        ray.get([shard.push.remote(zero) for shard, zero in zip(self.shards, self.zeros, strict=True)])

    def _rows(self) -> None:
        count = self.task["rows"] // self.task["shards"]
        wanted = [self.random.integers(0, self.total_rows, count) for _ in self.shards]
        values = ray.get([shard.fetch.remote(rows) for shard, rows in zip(self.shards, wanted, strict=True)])
        pushes = zip(self.shards, values, wanted, strict=True)
        ray.get([shard.push.remote(np.zeros_like(value), rows) for shard, value, rows in pushes])


def call_us(shard: Any) -> float:
    """The quickest of some rounds of calls that do nothing."""
    best_s = float("inf")
    for _ in range(5):
        start_s = time.perf_counter()
        for _ in range(100):
            ray.get(shard.nothing.remote())
        best_s = min(best_s, (time.perf_counter() - start_s) / 100)
    return round(best_s * 1e6, 1)


def memory(parent: int) -> tuple[int, int]:
    """Processes below a process, and the bytes that are theirs (shared ones divided among those who share them)."""
    parents = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(directory.name)] = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    below = [parent]
    for pid in below:
        below += [child for child, its_parent in parents.items() if its_parent == pid]
    total = 0
    for pid in below[1:]:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return len(below) - 1, total


def main() -> None:
    task = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory(prefix="ray-") as directory:
        os.environ["RAY_TMPDIR"] = directory
        start_s = time.perf_counter()
        # A cluster of its own, whatever else runs here.
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=2,
            object_store_memory=3 << 30 if task["case"] == "dense" else 80 << 20,
            log_to_driver=False,
            configure_logging=False,
            _temp_dir=directory,
        )
        started_s = time.perf_counter() - start_s
        processes, memory_bytes = memory(os.getpid())
        try:
            shards = [Shard.remote(task) for _ in range(task["shards"])]
            ray.get([shard.nothing.remote() for shard in shards])
            workers = [Worker.remote(task, shards, number) for number in range(task["workers"])]
            ray.get([worker.run.remote(0) for worker in workers])
            notes = {
                "start_s": round(started_s, 2),
                "processes": processes,
                "memory_mb": round(memory_bytes / 1e6),
                "call_us": call_us(shards[0]),
                "version": ray.__version__,
            }
            answer(lambda steps: max(ray.get([worker.run.remote(steps) for worker in workers])), notes)
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
