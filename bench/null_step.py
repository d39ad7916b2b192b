"""python -m bench.null_step: what parameter servers alone cost: fetch everything, push zeros, compute nothing.

As Figure 6 of Abadi et al., "TensorFlow: A System for Large-Scale Machine Learning", OSDI 2016, here with two shards
and all processes on one machine: one scalar, 100 MB of dense variables, and 32 rows of a large table, for some numbers
of workers that step independently. Beside millrace a plain parameter server of Ray actors (`--ray PYTHON`) and
TensorFlow's `ParameterServerStrategy` (`--tensorflow PYTHON`), in turn in one run. Prints a JSON line for each:
milliseconds of a step that every worker takes (the best round and the median), and how many times millrace's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

SHARDS, ROWS = 2, 32
DENSE_BYTES, TABLE_BYTES = 100_000_000, 1_000_000_000
TURN_S = 0.5  # about how long a turn lasts


class System:
    """One peer: a process that takes turns."""

    def __init__(self, name: str, python: str, task: dict[str, Any]) -> None:
        command = [python, "-m", f"bench.peers.null_{name}", json.dumps(task)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name = name
        self.notes: dict[str, Any] = self._read()["ready"]
        self.seconds: list[float] = []

    def calibrate(self) -> None:
        """Find how many steps make a turn."""
        self.run(2)
        self.steps = 5
        once_s = self.run(self.steps)
        self.steps = max(2, min(2000, round(self.steps * TURN_S / max(once_s, 1e-6))))

    def run(self, steps: int) -> float:
        """Seconds for so many steps of every worker."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"run": steps}) + "\n")
        self._process.stdin.flush()
        found: float = self._read()["seconds"]
        return found

    def turn(self) -> None:
        """Take one turn."""
        self.seconds.append(self.run(self.steps) / self.steps)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise SystemExit(f"{self._process.args!r} ended with {self._process.wait()}")


def measure(pythons: dict[str, str], task: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """The figures of one case, all systems in turn."""
    systems: list[System] = []
    try:
        for name, python in pythons.items():
            systems.append(System(name, python, task))
            systems[-1].calibrate()
            print(f"  {name}: {task}: {systems[-1].notes}", file=sys.stderr, flush=True)
        for _ in range(rounds):
            for system in systems:
                system.turn()
                time.sleep(0.05)
    finally:
        for system in systems:
            system.close()
    ours = systems[0].seconds
    return [
        {
            "name": f"null step/{task['case']}/{system.name}",
            "size_bytes": task["size_bytes"],
            "workers": task["workers"],
            "ms": round(min(system.seconds) * 1e3, 3),
            "median_ms": round(statistics.median(system.seconds) * 1e3, 3),
            "times_millrace": round(statistics.median(s / o for s, o in zip(system.seconds, ours, strict=True)), 2),
            "rounds": rounds,
            "notes": system.notes,
        }
        for system in systems
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is asked for."""
    options = argparse.ArgumentParser(prog="python -m bench.null_step", description=__doc__)
    options.add_argument("--cases", nargs="+", default=["scalar", "rows", "dense"], choices=["scalar", "rows", "dense"])
    options.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    options.add_argument("--tables", type=int, nargs="+", default=[TABLE_BYTES], help="bytes of the table")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--ray", metavar="PYTHON", help="an interpreter that has ray and numpy")
    options.add_argument("--tensorflow", metavar="PYTHON", help="an interpreter that has tensorflow")
    given = options.parse_args(arguments)
    pythons = {"millrace": sys.executable}
    pythons |= {name: getattr(given, name) for name in ("ray", "tensorflow") if getattr(given, name)}
    sizes = {"scalar": [4 * SHARDS], "dense": [DENSE_BYTES], "rows": given.tables}
    for case in given.cases:
        for size_bytes in sizes[case]:
            for workers in given.workers:
                task = {"case": case, "size_bytes": size_bytes, "workers": workers, "shards": SHARDS, "rows": ROWS}
                for figure in measure(pythons, task, given.rounds):
                    print(json.dumps(figure), flush=True)


if __name__ == "__main__":
    main()
