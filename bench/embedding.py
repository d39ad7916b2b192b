"""python -m bench.embedding: a large table of embeddings on the CPU and the dense part on a GPU, against all on either.

The step is that of a model that looks up words and puts them through dense layers, with SGD. The ways to run it are
timed in turn, round after round. Prints one JSON line for each: its milliseconds, the ratio of the split one's to them
(above 1: the split one is faster), and its loss, which must be the same everywhere. Without a GPU a second CPU worker
stands for it, which says nothing of GPUs: the lines then say so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millrace.graph.graph import Graph
from millrace.graph.training import training_graph
from millrace.partition.placed import Planner
from millrace.place.hints import Hints
from millrace.place.placement import place
from millrace.place.probe import local_cluster
from millrace.runtime.placed_session import PlacedSession
from millrace.runtime.workers import ProcessWorkers

FETCHES = ["train", "loss"]


class TableAndDense(nn.Module):
    """Words [batch, length] -> scores [batch, 16]."""

    def __init__(self, words: int, width: int, dense: int) -> None:
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.dense = nn.Sequential(
            nn.Linear(width, dense), nn.ReLU(), nn.Linear(dense, dense), nn.ReLU(), nn.Linear(dense, 16)
        )

    def forward(self, words: Tensor) -> Tensor:
        return self.dense(self.table(words).mean(1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure. Exit status 0; 1 where the losses differ."""
    options = argparse.ArgumentParser(prog="python -m bench.embedding", description=__doc__)
    options.add_argument("--words", type=int, default=1_000_000)
    options.add_argument("--width", type=int, default=64)
    options.add_argument("--dense", type=int, default=2048)
    options.add_argument("--batch", type=int, default=2048)
    options.add_argument("--length", type=int, default=32)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--compile", default="inductor", choices=("eager", "inductor"))
    given = options.parse_args(arguments)
    torch.manual_seed(0)
    model = TableAndDense(given.words, given.width, given.dense)
    batch = (torch.randint(given.words, (given.batch, given.length)), torch.randint(16, (given.batch,)))
    graph = training_graph(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), batch)
    gpu = torch.cuda.is_available()
    other = "gpu:0" if gpu else "cpu:1"
    sessions = {}
    try:
        for name, devices, hints in (
            ("split", ["cpu:0", other], {"table": "cpu:0", "dense": other}),
            ("all on the CPU", ["cpu:0"], {}),
            *([("all on the GPU", ["gpu:0"], {})] if gpu else []),
        ):
            sessions[name] = session_on(graph, devices, hints, given.compile)
            print(f"  {name}: ready", file=sys.stderr, flush=True)
        losses = {name: float(session.run(FETCHES, batch)[1]) for name, session in sessions.items()}
        seconds: dict[str, list[float]] = {name: [] for name in sessions}
        for _ in range(given.rounds):
            for name, session in sessions.items():
                seconds[name].append(min(timed(lambda s=session: s.run(FETCHES, batch)) for _ in range(2)))
    finally:
        for session in sessions.values():
            session.close()
    report(seconds, losses, gpu)
    return 0 if max(losses.values()) - min(losses.values()) < 1e-3 * max(losses.values()) else 1


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def session_on(graph: Graph, devices: Sequence[str], hints: Mapping[str, str], compile: str) -> PlacedSession:
    """The step over these devices, with the table and its update where the hints have them."""
    cluster = local_cluster(devices)
    fused = compile != "eager"
    home = {"table.weight": hints["table"]} if hints else {}
    wishes = Hints(modules=hints, variables=home)
    planner = Planner(lambda g: place(g, cluster, wishes, fused=fused), fused=fused)
    return PlacedSession(graph, planner, ProcessWorkers(cluster.devices), compile=compile, timeout_s=600.0)


def report(seconds: Mapping[str, Sequence[float]], losses: Mapping[str, float], gpu: bool) -> None:
    """One line for each way."""
    for name, taken in seconds.items():
        figure: dict[str, Any] = {
            "name": name,
            "ms": round(1e3 * statistics.median(taken), 3),
            "ratio": round(statistics.median(a / b for a, b in zip(taken, seconds["split"], strict=True)), 3),
            "loss": losses[name],
        }
        print(json.dumps(figure if gpu else {**figure, "gpu": "none: a second CPU worker stands for it"}), flush=True)


def timed(step: Callable[[], Any]) -> float:
    """Seconds of one step."""
    start_s = time.perf_counter()
    step()
    return time.perf_counter() - start_s


if __name__ == "__main__":
    sys.exit(main())
