"""What the null-step peers have in common: lines of JSON with `bench.null_step`, and with workers of their own.

To {"run": N} a peer answers {"seconds": S}: how long its workers took for N steps each, started together. It ends when
its standard input does. Nothing here needs a framework: the peers live in environments of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

ROW_WIDTH = 64  # floats in a row of a table


def serve_turns(workers: Sequence[subprocess.Popen[str]], notes: dict[str, Any]) -> None:
    """Pass every turn on to worker processes that `follow`, and answer with the slowest one's seconds."""

    def run(steps: int) -> float:
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write(json.dumps({"run": steps}) + "\n")
            worker.stdin.flush()
        seconds = []
        for worker in workers:
            assert worker.stdout is not None
            seconds.append(json.loads(worker.stdout.readline())["seconds"])
        return max(seconds)

    answer(run, notes)


def follow(run: Callable[[int], None]) -> None:
    """A worker process: take steps when told to."""

    def timed(steps: int) -> float:
        start_s = time.perf_counter()
        run(steps)
        return time.perf_counter() - start_s

    answer(timed, {})


def answer(run: Callable[[int], float], notes: dict[str, Any]) -> None:
    """Say that all is ready, then take turns until the standard input ends. run: steps -> seconds."""
    print(json.dumps({"ready": notes}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"seconds": run(json.loads(line)["run"])}), flush=True)
