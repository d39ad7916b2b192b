"""Runs the peers of one workload in turn and gathers what they say."""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from catalogue import PeerSpec
from models import export
from worker import PeerError, Worker, worker_environment
from workloads import Workload

TURN_LIMIT_S = 300.0
_PAUSE_S = 0.02  # lets the threads of the peer before go to sleep


@dataclass
class Settings:
    """How to measure. turn_s: about how long one peer's turn lasts. starts: how many peers start at a time."""

    threads: int = 2
    rounds: int = 7
    turn_s: float = 0.3
    starts: int = 2
    start_limit_s: float = 300.0
    device: str = "cpu"


@dataclass
class Samples:
    """What one peer said. step_s: seconds per step, one for each round."""

    spec: PeerSpec
    ready: dict[str, Any] = field(default_factory=dict)
    step_s: list[float] = field(default_factory=list)
    final_loss: float = math.nan
    memory: dict[str, int] = field(default_factory=dict)


@dataclass
class Race:
    """All that was seen of one workload in one precision. failed: peer -> why."""

    workload: Workload
    precision: str
    settings: Settings
    samples: dict[str, Samples]
    failed: dict[str, str]
    steps_per_turn: int = 0


def race(workload: Workload, precision: str, peers: Sequence[PeerSpec], settings: Settings) -> Race:
    """Start the peers, let them take turns, and end them.

    Every peer takes the same number of steps in every turn; the order moves on by one each round. A peer that fails
    is reported and left out; the others go on.
    """
    with exported(workload) as weights, ExitStack() as stack:
        task = task_of(workload, precision, weights, settings)
        workers, result = _start(workload, precision, peers, settings, task, stack)
        if workers:
            result.steps_per_turn = _steps_per_turn(result, settings.turn_s)
            _alternate(workers, result)
            _ask_memory(workers, result)
    return result


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


def _start(
    workload: Workload,
    precision: str,
    peers: Sequence[PeerSpec],
    settings: Settings,
    task: Mapping[str, Any],
    stack: ExitStack,
) -> tuple[dict[str, Worker], Race]:
    environment = worker_environment(settings.threads)

    def start(spec: PeerSpec) -> tuple[Worker, dict[str, Any] | PeerError]:
        worker = Worker(spec, task, environment)
        stack.callback(worker.close)
        begun_s = time.monotonic()
        try:
            ready = worker.answer(settings.start_limit_s)["ready"]
        except PeerError as error:
            worker.close()
            say(str(error))
            return worker, error
        say(f"{workload.name} {precision}: {spec.title} ready in {time.monotonic() - begun_s:.0f} s")
        return worker, ready

    workers: dict[str, Worker] = {}
    result = Race(workload, precision, settings, {}, {})
    with ThreadPoolExecutor(settings.starts) as pool:
        for spec, (worker, ready) in zip(peers, pool.map(start, peers), strict=True):
            if isinstance(ready, PeerError):
                result.failed[spec.name] = str(ready)
            else:
                workers[spec.name] = worker
                result.samples[spec.name] = Samples(spec, ready)
    return workers, result


def _steps_per_turn(result: Race, turn_s: float) -> int:
    """As many steps as the slowest peer takes in `turn_s`, and a whole number of every peer's calls."""
    slowest_s = max(sample.ready["step_s"] for sample in result.samples.values())
    unit = math.lcm(*(sample.spec.options.get("steps_per_call", 1) for sample in result.samples.values()))
    return max(1, round(turn_s / slowest_s / unit)) * unit


def _alternate(workers: dict[str, Worker], result: Race) -> None:
    """One round that does not count, then the rounds that do."""
    for number in range(-1, result.settings.rounds):
        names = list(workers)
        shift = number % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            time.sleep(_PAUSE_S)
            answer = _asked(workers, name, {"run": result.steps_per_turn}, result)
            if answer is not None and number >= 0:
                result.samples[name].step_s.append(answer["seconds"] / result.steps_per_turn)
                result.samples[name].final_loss = answer["loss"]


def _ask_memory(workers: dict[str, Worker], result: Race) -> None:
    for name in list(workers):
        answer = _asked(workers, name, {"end": True}, result)
        if answer is not None:
            result.samples[name].memory = answer


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
