"""Runs the peers of one workload in turn (A B C, B C A, C A B, …) and gathers what they say.

Each peer is a process of its own that waits while another one's turn lasts. A turn lasts as long for every peer; how
many steps that are is found out before the rounds begin.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.catalogue import PeerSpec
from bench.models import export
from bench.worker import PeerError, Worker, worker_environment
from bench.workloads import Workload

TURN_LIMIT_S = 300.0
_PAUSE_S = 0.02  # lets the threads of the peer before go to sleep


@dataclass(frozen=True)
class Settings:
    """How to measure.

    cache: a directory for what the peers compile; races share it. turn_s: how long one peer's turn lasts. starts: how
    many peers start at a time.
    """

    cache: Path
    threads: int = 2
    rounds: int = 7
    turn_s: float = 0.3
    starts: int = 2
    start_limit_s: float = 300.0
    device: str = "cpu"


@dataclass
class Samples:
    """What one peer said. seconds: per step in a race, to the first step's end otherwise; one for each round."""

    spec: PeerSpec
    ready: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)


@dataclass
class Race:
    """All that was seen of one workload in one precision. failed: peer -> why."""

    workload: Workload
    precision: str
    settings: Settings
    samples: dict[str, Samples] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def race(workload: Workload, precision: str, peers: Sequence[PeerSpec], settings: Settings) -> Race:
    """Start the peers, let them take turns, and end them.

    A peer that fails is reported and left out; the others go on.
    """
    result = Race(workload, precision, settings)
    with exported(workload) as weights, ExitStack() as stack:
        task = task_of(workload, precision, weights, settings)
        workers = _start(peers, task, result, stack)
        steps = {}
        for name in list(workers):
            answer = _asked(workers, name, {"calibrate": settings.turn_s}, result)
            steps[name] = answer["steps"] if answer else 0
        for number in range(settings.rounds):
            for name in turns(list(workers), number):
                time.sleep(_PAUSE_S)
                answer = _asked(workers, name, {"run": steps[name]}, result)
                if answer is not None:
                    result.samples[name].seconds.append(answer["seconds"] / steps[name])
        for name in list(workers):
            result.samples[name].memory = _asked(workers, name, {"end": True}, result) or {}
    return result


def turns(names: Sequence[str], number: int) -> list[str]:
    """The order of round `number`: everybody once, and whoever was first in the round before is last."""
    shift = number % max(len(names), 1)
    return [*names[shift:], *names[:shift]]


@contextmanager
def exported(workload: Workload) -> Iterator[Path]:
    """The file with the workload's weights and batch."""
    with tempfile.TemporaryDirectory(prefix="millrace-bench-") as directory:
        path = Path(directory) / "weights.npz"
        export(workload, path)
        yield path


def task_of(workload: Workload, precision: str, weights: Path, settings: Settings) -> dict[str, Any]:
    """What a worker is told; it stands for itself, so that peers need not know our modules."""
    return {
        "workload": workload.name,
        "sizes": dict(workload.sizes),
        "optimizer": workload.optimizer,
        "learning_rate": workload.learning_rate,
        "check_steps": workload.check_steps,
        "precision": precision,
        "weights": str(weights),
        "threads": settings.threads,
        "device": settings.device,
    }


def say(message: str) -> None:
    """Progress, apart from the results."""
    print(f"  {message}", file=sys.stderr, flush=True)


def _start(peers: Sequence[PeerSpec], task: Mapping[str, Any], result: Race, stack: ExitStack) -> dict[str, Worker]:
    settings = result.settings
    environment = worker_environment(settings.threads, settings.cache)

    def start(spec: PeerSpec) -> tuple[Worker, dict[str, Any] | PeerError]:
        begun_s = time.monotonic()
        worker = Worker(spec, task, environment)
        stack.callback(worker.close)
        try:
            ready = worker.answer(settings.start_limit_s)["ready"]
        except PeerError as error:
            worker.close()
            say(str(error))
            return worker, error
        took_s = time.monotonic() - begun_s
        say(f"{task['workload']} {task['precision']}: {spec.title} ({spec.name}) ready in {took_s:.0f} s")
        return worker, ready

    workers: dict[str, Worker] = {}
    with ThreadPoolExecutor(settings.starts) as pool:
        try:
            for spec, (worker, ready) in zip(peers, pool.map(start, peers), strict=True):
                if isinstance(ready, PeerError):
                    result.failed[spec.name] = str(ready)
                else:
                    workers[spec.name] = worker
                    result.samples[spec.name] = Samples(spec, ready)
        except BaseException:  # Ctrl-C: those that are still starting would keep the pool, and us, waiting
            stack.close()
            raise
    return workers


def _asked(workers: dict[str, Worker], name: str, question: dict[str, Any], result: Race) -> dict[str, Any] | None:
    """The answer; None, with the peer taken out of the race, when it fails."""
    try:
        return workers[name].ask(question, TURN_LIMIT_S)
    except PeerError as error:
        say(str(error))
        workers.pop(name).close()
        result.samples.pop(name)
        result.failed[name] = str(error)
        return None
