"""A run that trains on the digits while faults happen to its processes; what of it is noted, and when."""

from __future__ import annotations

import argparse
import os
import random
import secrets
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bench.fragile import DIRECTORY, fragile
from millrace.graph.graph import TRAIN
from millrace.graph.training import training_graph
from millrace.replicas.hub import Event, Hub, Lost, Said
from millrace.replicas.rendezvous import Rendezvous
from millrace.replicas.server_session import ServerSession
from millrace.replicas.session import ReplicatedSession
from millrace.replicas.settings import Async, Sync
from millrace.runtime.choose_launcher import choose_launcher
from millrace.runtime.launch import Launcher

MEMBER = "millrace.replicas.member"
BATCH = 256
FULL_WITHIN_S = 120.0  # on a local Ray, a new process takes seconds

Session = ReplicatedSession | ServerSession


@dataclass
class Fault:
    """One fault. Moments are of the monotonic clock; 0.0: not yet."""

    injected_s: float
    noticed_s: float = 0.0
    next_step_s: float = 0.0
    longest_pause_s: float = 0.0  # without a finished step
    goodput: float = 0.0  # until all was well again, and no shorter than a cycle


class NotingHub(Hub):
    """Tells when the driver learns that something is wrong."""

    on_trouble: Callable[[], None] = staticmethod(lambda: None)

    def next(self, timeout_s: float) -> Event | None:
        """See `Hub.next`."""
        event = super().next(timeout_s)
        if isinstance(event, Lost) or (isinstance(event, Said) and event.message.kind == "error"):
            self.on_trouble()
        return event


@dataclass
class FaultyRun:
    """A session that takes steps, and what is noted of it."""

    session: Session
    launcher: Launcher
    steps_of: Generator[Any, None, None]
    faults: list[Fault] = field(default_factory=list)
    steps: int = 0
    last_s: float = 0.0

    def step(self) -> float:
        """Take one. Returns: the loss."""
        (_, loss), _ = next(self.steps_of)
        now_s = time.monotonic()
        self.steps += 1
        if self.faults:
            fault = self.faults[-1]
            fault.longest_pause_s = max(fault.longest_pause_s, now_s - max(self.last_s, fault.injected_s))
            if fault.noticed_s and not fault.next_step_s:
                fault.next_step_s = now_s
        self.last_s = now_s
        return float(loss)

    def rate_for(self, seconds: float) -> float:
        """Take steps for so long. Returns: steps a second."""
        began, began_s = self.steps, time.monotonic()
        while time.monotonic() - began_s < seconds:
            self.step()
        return (self.steps - began) / (time.monotonic() - began_s)

    def noticed(self) -> None:
        """The driver has learnt of a loss or an error."""
        if self.faults and not self.faults[-1].noticed_s:
            self.faults[-1].noticed_s = time.monotonic()

    def cycle(
        self, hit: Callable[[FaultyRun], None], choices: random.Random, healthy: float, at_least_s: float
    ) -> None:
        """A fault at some moment within the next steps, and steps until all is well again."""
        done = threading.Event()

        def inject() -> None:
            self.faults.append(Fault(time.monotonic()))
            hit(self)
            done.set()

        threading.Timer(choices.uniform(0.02, 0.2), inject).start()
        while not done.is_set():
            self.step()
        fault, before = self.faults[-1], self.steps
        while not fault.next_step_s or time.monotonic() - fault.injected_s < at_least_s or not self.is_full():
            self.step()
            if time.monotonic() - fault.injected_s > FULL_WITHIN_S:
                raise SystemExit(f"after {FULL_WITHIN_S:g} s only {self.session.members} are there")
        fault.goodput = (self.steps - before) / (time.monotonic() - fault.injected_s) / healthy

    def is_full(self) -> bool:
        """Whether everybody is there, and shards have their copies."""
        return self.session.complete

    def again(self) -> int:
        """How many slices or batches were given out again so far, as their process was lost."""
        return self.session.repeats

    # -- faults ---------------------------------------------------------------------------------------------------

    def signal(self, member: str, what: signal.Signals) -> None:
        """Kill or freeze one of the processes."""
        os.kill(self.launcher.pids[member], what)

    def workers(self) -> list[str]:
        """Those that compute."""
        return list(self.session.workers)

    def shards(self) -> list[str]:
        """Those that hold the variables."""
        assert isinstance(self.session, ServerSession)
        return list(self.session.holders)

    def copies(self) -> list[str]:
        """Those that follow them."""
        assert isinstance(self.session, ServerSession)
        return list(self.session.copy_holders)

    def spares(self) -> list[str]:
        """Those that stand by."""
        busy = {*self.workers(), *(self.shards() + self.copies() if isinstance(self.session, ServerSession) else [])}
        return [member for member in self.session.members if member not in busy]


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy."""
    return F.cross_entropy(fragile(model(batch[0])), batch[1])


def batches(data: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Without end."""
    while True:
        picked = torch.randint(len(data[0]), (BATCH,))
        yield data[0][picked], data[1][picked]


def begin(update: Sync | Async, directory: Path, given: argparse.Namespace) -> FaultyRun:
    """A run of which all processes are there."""
    digits = load_digits()
    data = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    graph = training_graph(
        model, classify, torch.optim.AdamW(model.parameters(), lr=1e-3), (data[0][:BATCH], data[1][:BATCH])
    )
    servers = update.parameter_servers
    everybody = given.replicas + given.spares + 2 * servers
    local = {"local_cpus": everybody + 4} if given.cluster == "local" else {}
    os.environ[DIRECTORY] = str(directory / "faults")
    (directory / "faults").mkdir()
    launcher = choose_launcher(given.cluster, MEMBER, ["--imports", "bench.fragile"], 1, directory, **local)
    hub = NotingHub(launcher, secrets.token_bytes(32), directory, lambda line: print(line, file=sys.stderr))
    settings: dict[str, Any] = {"replicas": given.replicas, "spares": given.spares, "compile": "eager"}
    settings |= {"drop_failing": True, "say": lambda line: None}
    session: Session
    if servers:
        session = ServerSession(graph, hub, update, **settings)
    else:
        session = ReplicatedSession(graph, hub, Rendezvous(), **settings)
    run = FaultyRun(session, launcher, session.stream([TRAIN, "loss"], batches(data)))
    hub.on_trouble = run.noticed
    run.step()
    deadline_s = time.monotonic() + FULL_WITHIN_S
    while not run.is_full() and time.monotonic() < deadline_s:
        run.step()
    run.rate_for(1.0)
    return run


def told(run: FaultyRun, first: int) -> dict[str, object]:
    """What the faults from number `first` on cost: median and maximum."""
    faults = run.faults[first:]

    def spread(values: list[float]) -> dict[str, float]:
        return {"median": round(statistics.median(values), 3), "max": round(max(values), 3)}

    return {
        "faults": len(faults),
        "noticed_s": spread([fault.noticed_s - fault.injected_s for fault in faults]),
        "next_step_s": spread([fault.next_step_s - fault.injected_s for fault in faults]),
        "longest_pause_s": spread([fault.longest_pause_s for fault in faults]),
        "goodput": {
            "median": round(statistics.median(fault.goodput for fault in faults), 3),
            "min": round(min(fault.goodput for fault in faults), 3),
        },
    }
