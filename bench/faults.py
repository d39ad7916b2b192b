"""python -m bench.faults: what a lost worker costs a synchronous run: until it is noticed, and until the next step.

Replicas train on the digits, over processes of this machine (or a local Ray: --cluster local). Now and then one of
them is killed (SIGKILL) or frozen (SIGSTOP) at a moment drawn by seed, a spare takes its place, and the next fault
comes when all are there again. Prints one JSON line for each kind: seconds until the loss was noticed, from the fault
to the next finished step, how many steps were handed out twice, and goodput: the steps taken in the time of the whole,
the start of new spares included, against those of the same time without faults.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import secrets
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from millrace.graph.graph import TRAIN
from millrace.graph.training import training_graph
from millrace.replicas.hub import Hub
from millrace.replicas.rendezvous import Rendezvous
from millrace.replicas.session import ReplicatedSession
from millrace.runtime.choose_launcher import choose_launcher
from millrace.runtime.launch import Launcher

KINDS = {"killed": signal.SIGKILL, "frozen": signal.SIGSTOP}
MEMBER = "millrace.replicas.member"
BATCH = 256


@dataclass
class Fault:
    """One fault. Moments are of the monotonic clock; 0.0: not yet."""

    injected_s: float
    noticed_s: float = 0.0
    next_step_s: float = 0.0


@dataclass
class Run:
    """A session that takes steps, and what is noted of it."""

    session: ReplicatedSession
    launcher: Launcher
    data: tuple[Tensor, Tensor]
    faults: list[Fault] = field(default_factory=list)
    steps: int = 0

    def step(self) -> float:
        """Take one. Returns: the loss."""
        picked = torch.randint(len(self.data[0]), (BATCH,))
        loss = self.session.run([TRAIN, "loss"], (self.data[0][picked], self.data[1][picked]))[1]
        self.steps += 1
        if self.faults and self.faults[-1].noticed_s and not self.faults[-1].next_step_s:
            self.faults[-1].next_step_s = time.monotonic()
        return float(loss)

    def steps_for(self, seconds: float) -> float:
        """Take steps for so long. Returns: steps a second."""
        began, began_s = self.steps, time.monotonic()
        while time.monotonic() - began_s < seconds:
            self.step()
        return (self.steps - began) / (time.monotonic() - began_s)

    def noticed(self, line: str) -> None:
        """What the session says, of which only losses count."""
        if "was lost" in line and self.faults and not self.faults[-1].noticed_s:
            self.faults[-1].noticed_s = time.monotonic()


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure. Exit status 0."""
    options = argparse.ArgumentParser(prog="python -m bench.faults", description=__doc__)
    options.add_argument("--kinds", default=",".join(KINDS))
    options.add_argument("--faults", type=int, default=20, help="of each kind")
    options.add_argument("--replicas", type=int, default=3)
    options.add_argument("--spares", type=int, default=1)
    options.add_argument("--cluster", default=None, help="local: members are actors of a local Ray")
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args(arguments)
    torch.manual_seed(given.seed)
    for kind in given.kinds.split(","):
        with tempfile.TemporaryDirectory(prefix="millrace-") as directory:
            print(json.dumps({"name": f"faults, {kind}", **measure(kind, Path(directory), given)}), flush=True)
    return 0


def measure(kind: str, directory: Path, given: argparse.Namespace) -> dict[str, object]:
    """All faults of one kind in one run."""
    digits = load_digits()
    data = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    graph = training_graph(
        model, classify, torch.optim.AdamW(model.parameters(), lr=1e-3), (data[0][:BATCH], data[1][:BATCH])
    )
    everybody = given.replicas + given.spares
    local = {"local_cpus": everybody + 4} if given.cluster == "local" else {}
    began_s = time.monotonic()
    launcher = choose_launcher(given.cluster, MEMBER, [], 1, directory, **local)
    hub = Hub(launcher, secrets.token_bytes(32), directory, lambda line: print(line, file=sys.stderr))
    lines: list[Run] = []
    with ReplicatedSession(
        graph,
        hub,
        Rendezvous(),
        replicas=given.replicas,
        spares=given.spares,
        compile="eager",
        say=lambda line: [run.noticed(line) for run in lines] and None,
    ) as session:
        run = Run(session, launcher, data)
        lines.append(run)
        first = run.step()
        start_s = time.monotonic() - began_s
        wait_for(run, everybody)
        run.steps_for(1.0)
        healthy = run.steps_for(5.0)
        choices = random.Random(given.seed)
        faulty_s, faulty_steps, taken_again = time.monotonic(), run.steps, 0
        for number in range(given.faults):
            inject(run, KINDS[kind], choices)
            while not run.faults[-1].next_step_s:
                run.step()
            taken_again += handed_out_twice(session.stories)
            wait_for(run, everybody)
            print(f"  {kind} {number + 1} of {given.faults}", file=sys.stderr, flush=True)
        rate = (run.steps - faulty_steps) / (time.monotonic() - faulty_s)
        last = statistics.mean(run.step() for _ in range(20))
    noticed = sorted(fault.noticed_s - fault.injected_s for fault in run.faults)
    again = sorted(fault.next_step_s - fault.injected_s for fault in run.faults)
    return {
        "faults": len(run.faults),
        "start_s": round(start_s, 2),
        "step_ms": round(1e3 / healthy, 2),
        "noticed_s": spread(noticed),
        "next_step_s": spread(again),
        "steps_taken_again": taken_again,
        "goodput": round(rate / healthy, 3),
        "loss_first_last": [round(first, 3), round(last, 4)],
    }


def inject(run: Run, what: signal.Signals, choices: random.Random) -> None:
    """Have a worker hit within the next steps, at a moment that has nothing to do with them."""
    victim = choices.choice(run.session.workers)
    done = threading.Event()

    def hit() -> None:
        run.faults.append(Fault(time.monotonic()))
        os.kill(run.launcher.pids[victim], what)
        done.set()

    threading.Timer(choices.uniform(0.05, 0.2), hit).start()
    while not done.is_set():
        run.step()


def handed_out_twice(stories: Iterable[str]) -> int:
    """How many of the last steps were begun more than once."""
    begun = Counter(found[1] for story in stories if (found := re.search(r"→ stepping: step (\d+):", story)))
    return sum(count > 1 for count in begun.values())


def wait_for(run: Run, members: int) -> None:
    """Go on until so many processes are there."""
    deadline_s = time.monotonic() + 120.0
    while len(run.session.members) < members:
        run.step()
        if time.monotonic() > deadline_s:
            raise SystemExit(f"only {len(run.session.members)} of {members} processes after 120 s")


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and maximum."""
    return {"median": round(statistics.median(seconds), 3), "max": round(max(seconds), 3)}


if __name__ == "__main__":
    sys.exit(main())
