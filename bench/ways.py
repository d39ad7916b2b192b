"""python -m bench.ways: the ways in which replicas can agree, side by side on one task: how long until it is learnt.

A perceptron of 1.1 million weights learns scikit-learn's digits until it knows a share of those that it never saw.
Every way takes as many examples an update, and an optimizer that suits it; runs are taken in turn, each with several
seeds. Prints a JSON line for each way: seconds from the first step until the bar is reached (the start of processes
apart), examples trained on until then, examples a second, and how stale updates were.

Replicas of this machine share its cores: what two gain here is bounded by what one process leaves idle. The table shows
what each way costs in updates and in traffic, not how it scales; for that see `bench.scale`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsFloat

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import millrace
from millrace.optim.optimizer import Optimizer
from millrace.replicas.settings import Async, Hybrid, LocalSteps, Sync
from millrace.train.callbacks import Callback, RunView

BATCH = 96
HELD_OUT = 360
MOST_EPOCHS = 120
EVALUATE_EVERY = 10  # steps of a batch


@dataclass(frozen=True)
class Way:
    """One way to train. settings: of `fit`. batch: of a step of the run."""

    optimizer: Callable[[], Optimizer]
    settings: Mapping[str, Any] = field(default_factory=dict)
    batch: int = BATCH


def adam() -> Optimizer:
    return millrace.optim.adam(1e-3)


def adagrad() -> Optimizer:
    return millrace.optim.adagrad(2e-2)


def ways(replicas: int) -> dict[str, Way]:
    """All of them, over so many replicas."""
    servers = {"parameter_servers": 2, "copies": False}
    return {
        "one process": Way(adam),
        "one process, adagrad": Way(adagrad),
        "sync, collective": Way(adam, {"replicas": replicas}),
        "sync, 2 servers": Way(adam, {"replicas": replicas, "update": Sync(**servers)}),
        "sync, 2 servers, 1 backup": Way(adam, {"replicas": replicas, "update": Sync(**servers, backup=1)}),
        "async, adagrad": Way(adagrad, {"replicas": replicas, "update": Async(**servers)}),
        "async, bound 1, adagrad": Way(adagrad, {"replicas": replicas, "update": Async(**servers, bound=1)}),
        "async, every 4, adagrad": Way(
            adagrad, {"replicas": replicas, "update": Async(**servers, fetch_every=4, push_every=4)}
        ),
        "async, overlap, adagrad": Way(adagrad, {"replicas": replicas, "update": Async(**servers, overlap=True)}),
        "hybrid, groups of 2, adagrad": Way(adagrad, {"replicas": 2, "update": Hybrid(**servers, groups=replicas)}),
        "local steps, every 10": Way(
            adam,
            {"replicas": replicas, "update": LocalSteps(every=10, learning_rate=1.0, momentum=0.5)},
            BATCH * replicas,
        ),
    }


class UntilLearnt(Callback):
    """Stops a run when an evaluation reaches the bar, and notes when that was."""

    def __init__(self, bar: float) -> None:
        self._bar = bar
        self.first = self.last = (0, 0.0)  # steps, and when they were done
        self.learnt_s: float | None = None
        self.learnt_steps = 0

    def on_step(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
        self.last = (step, time.monotonic())
        if not self.first[0]:
            self.first = self.last

    def on_evaluate(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
        if self.learnt_s is None and float(values["accuracy"]) >= self._bar:
            self.learnt_s, self.learnt_steps = time.monotonic() - self.first[1], step
            run.stop()


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    scores = model(batch[0])
    return F.cross_entropy(scores, batch[1]), {"accuracy": (scores.argmax(-1) == batch[1]).float().mean()}


def train(way: Way, bar: float, seed: int) -> dict[str, float]:
    """One run. Returns: the figures; without "seconds" where the bar was not reached."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    learn, held_out = order[HELD_OUT:], order[:HELD_OUT]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    until = UntilLearnt(bar)
    result = millrace.fit(
        model,
        (images[learn], labels[learn]),
        loss=loss,
        optimizer=way.optimizer(),
        batch_size=way.batch,
        validation=(images[held_out], labels[held_out]),
        callbacks=[until],
        epochs=MOST_EPOCHS,
        evaluate_every=EVALUATE_EVERY // (way.batch // BATCH),
        seed=seed,
        compile="eager",
        run_dir=False,
        progress=False,
        **way.settings,
    )
    (first, first_s), (last, last_s) = until.first, until.last
    figures = {"examples_per_s": (last - first) * way.batch / (last_s - first_s), "staleness": result.mean_staleness}
    if until.learnt_s is not None:
        figures |= {"seconds": until.learnt_s, "examples": float(until.learnt_steps * way.batch)}
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure. Exit status 0."""
    options = argparse.ArgumentParser(prog="python -m bench.ways", description=__doc__)
    options.add_argument("--replicas", type=int, default=2)
    options.add_argument("--bar", type=float, default=0.97, help="the share of unseen digits to be known")
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--ways", help="only those whose names begin so, with commas between them")
    given = options.parse_args(arguments)
    torch.set_num_threads(1)
    chosen = {
        name: way
        for name, way in ways(given.replicas).items()
        if given.ways is None or name.startswith(tuple(given.ways.split(",")))
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    for seed in range(given.seeds):
        for name, way in chosen.items():
            found[name].append(train(way, given.bar, seed))
            print(f"  seed {seed}, {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    for name, runs in found.items():
        print(
            json.dumps(
                {"name": name, "learnt": sum("seconds" in run for run in runs), "of": len(runs), **summary(runs)}
            )
        )
    return 0


def summary(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each figure, over the runs that have it."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: round(statistics.median(run[name] for run in runs if name in run), 2) for name in names}


if __name__ == "__main__":
    sys.exit(main())
