"""python -m bench.soak: `fit` while a random fault happens every ten seconds, beside the same run without faults.

The digits are trained on over replicas, for --seconds. Every --every seconds one of the run's processes, whichever it
is, is killed or frozen, or fails in the user's code, or runs out of memory. Then two runs of as many steps without
faults (another seed each) say what the loss would have been. Prints one JSON line: faults by kind, how often the run
had to go back to its last checkpoint, the losses, and what was left behind: processes, files, ports, shared memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import SupportsFloat

import torch
from sklearn.datasets import load_digits
from torch import nn

from bench.faulty_run import classify
from bench.fragile import DIRECTORY, MEMORY, RAISE
from millrace import Callback
from millrace.replicas.settings import Async, Sync
from millrace.train.callbacks import RunView
from millrace.train.fit import fit

UPDATES = {"collective": Sync(), "servers": Sync(parameter_servers=1), "async": Async()}
KINDS = ("killed", "frozen", RAISE, MEMORY)
BATCH = 64
LAST_STEPS = 100  # whose mean loss counts
_ENDED_WITHIN_S = 10.0


class Watch(Callback):
    """Ends the run when its time is over, notes losses, and takes no more than so many steps a second."""

    def __init__(self, seconds: float, least_s: float) -> None:
        self.losses: list[float] = []
        self._end_s = time.monotonic() + seconds
        self._least_s, self._next_s = least_s, 0.0

    def on_step(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """After a step."""
        del self.losses[step - 1 :]  # the run may have gone back
        self.losses.append(float(values["loss"]))
        if time.monotonic() > self._end_s:
            run.stop()
        time.sleep(max(0.0, self._next_s - time.monotonic()))
        self._next_s = time.monotonic() + self._least_s


class Faults(threading.Thread):
    """Does something to one of this process's members every so often."""

    def __init__(self, every_s: float, orders: Path, seed: int) -> None:
        super().__init__(daemon=True)
        self.count: Counter[str] = Counter()
        self._every_s, self._orders, self._choices = every_s, orders, random.Random(seed)
        self._over = threading.Event()

    def run(self) -> None:
        """Until `end`."""
        while not self._over.wait(self._every_s):
            kind = self._choices.choice(KINDS)
            found = members()
            if kind in (RAISE, MEMORY):
                (self._orders / f"{kind}-{self.count.total()}").touch()
            elif found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._choices.choice(found), signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
            self.count[kind] += 1

    def end(self) -> None:
        """No more from here on."""
        self._over.set()
        self.join()
        for order in self._orders.iterdir():
            order.unlink(missing_ok=True)


def descendants() -> dict[int, str]:
    """Processes that are below this one, with their names."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            name, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(")")
            parents[int(entry.name)], names[int(entry.name)] = int(rest.split()[1]), name
    found: set[int] = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: names[pid] for pid in found - {os.getpid()}}


def members() -> list[int]:
    """Those that are members of a run."""
    return sorted(pid for pid, name in descendants().items() if name.startswith("millrace m"))


def train(
    update: Sync | Async, watch: Watch, seed: int, steps: int | None, given: argparse.Namespace
) -> dict[str, int]:
    """One run. Returns: what it says of restarts."""
    digits = load_digits()
    data = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
    with tempfile.TemporaryDirectory() as directory:
        result = fit(
            model,
            data,
            loss=classify,
            optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1),
            batch_size=BATCH,
            steps=10**9 if steps is None else steps,
            checkpoint_every=given.checkpoint_every,
            replicas=given.replicas,
            spares=given.spares,
            update=update,
            cluster=given.cluster,
            drop_failing=True,
            imports=["bench.fragile"],
            compile="eager",
            progress=given.progress,
            callbacks=[watch],
            run_dir=Path(directory, "run"),
            seed=seed,
        )
    return {"steps": result.steps, "restarts": result.restarts, "lost_updates": result.lost_updates}


def footprint(temporary: Path) -> dict[str, list[str]]:
    """What a run could leave behind."""
    opened = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of this very listing
            opened.add(os.readlink(f"/proc/self/fd/{number}"))
    return {
        "processes": sorted(
            f"{name} {pid}" for pid, name in descendants().items() if name not in ("fork_server", "python")
        ),
        "files": sorted(str(path) for path in temporary.iterdir()),
        "sockets": sorted(name for name in opened if name.startswith("socket:")),
        "shared_memory": sorted(name for name in opened if "memfd" in name) + sorted(os.listdir("/dev/shm")),
        "threads": sorted(thread.name for thread in threading.enumerate()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak. Exit status 0 when nothing was left and the loss is that of a run without faults, otherwise 1."""
    options = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    options.add_argument("--update", choices=UPDATES, default="async")
    options.add_argument("--seconds", type=float, default=600.0)
    options.add_argument("--every", type=float, default=10.0, help="seconds between two faults")
    options.add_argument("--steps-per-s", type=float, default=20.0, help="no more than so many")
    options.add_argument("--checkpoint-every", type=int, default=50, help="steps")
    options.add_argument("--replicas", type=int, default=2)
    options.add_argument("--spares", type=int, default=1)
    options.add_argument("--cluster", default=None, help="local: members are actors of a local Ray")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--progress", action="store_true")
    given = options.parse_args(arguments)
    update = UPDATES[given.update]
    with tempfile.TemporaryDirectory(prefix="mr-", dir="/tmp") as own, tempfile.TemporaryDirectory() as orders:
        tempfile.tempdir = own  # all that is made from here on
        os.environ[DIRECTORY] = orders
        quick = Watch(given.seconds, 0.0)
        train(update, quick, 1, 20, given)  # what a first run starts for all of this process's runs
        before = footprint(Path(own))
        faults, watch = Faults(given.every, Path(orders), given.seed), Watch(given.seconds, 1 / given.steps_per_s)
        faults.start()
        told = train(update, watch, 2, None, given)
        faults.end()
        left = left_behind(before, Path(own))
        references = []
        for seed in (2, 3):
            healthy = Watch(given.seconds, 0.0)
            train(update, healthy, seed, told["steps"], given)
            references.append(last_loss(healthy))
        tempfile.tempdir = None
    found = last_loss(watch)
    noise = 2 * abs(references[0] - references[1]) + 0.1 * statistics.mean(references)
    fine = not any(left.values()) and found <= statistics.mean(references) + noise
    line = {"name": f"soak, {given.update}", "faults": dict(faults.count), **told, "loss": round(found, 4)}
    print(json.dumps({**line, "losses_without_faults": [round(x, 4) for x in references], "left": left, "fine": fine}))
    return 0 if fine else 1


def left_behind(before: Mapping[str, list[str]], temporary: Path) -> dict[str, list[str]]:
    """What is there and was not, once what ends by itself has had time to."""
    end_s = time.monotonic() + _ENDED_WITHIN_S
    while True:
        now = footprint(temporary)
        left = {kind: sorted(set(now[kind]) - set(before[kind])) for kind in now}
        if not any(left.values()) or time.monotonic() > end_s:
            return left
        time.sleep(0.1)


def last_loss(watch: Watch) -> float:
    """The mean of the last steps' losses."""
    return statistics.mean(watch.losses[-LAST_STEPS:])


if __name__ == "__main__":
    sys.exit(main())
