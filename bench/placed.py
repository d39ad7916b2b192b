"""python -m bench.placed: a step over several worker processes against one process, and against what was expected.

Every configuration is a model, a number of workers (one thread each), of chunks of time and of microbatches, and a
search. They are timed in turn, round after round, with the whole step in one process of one thread beside them. Prints
one JSON line for each: the ratio to the one process (above 1: faster), the expected and the measured milliseconds; at
the end the median error of the expectation and the rank correlation over all. Before a model's lines stands the most
that so many workers can gain on this machine: what they do together when each takes whole steps of its own.

Two LSTM layers as a wave: python -m bench.placed --models recurrent --microbatches 1 --chunks 1,2,4,8 --compile eager
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models import Transformer
from millrace.graph.graph import Graph
from millrace.graph.passes.prune import prune
from millrace.graph.passes.time_chunks import time_chunks
from millrace.graph.training import training_graph
from millrace.partition.pieces import Piece
from millrace.partition.placed import Planner
from millrace.place.cluster import Cluster
from millrace.place.placement import place
from millrace.place.probe import local_cluster
from millrace.runtime.placed_session import PlacedSession
from millrace.runtime.session import Session
from millrace.runtime.workers import ProcessWorkers

FETCHES = ["train", "loss"]


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy over the last axis of what the model gives."""
    scores = model(batch[0])
    return F.cross_entropy(scores.flatten(0, -2), batch[1].flatten())


def transformer() -> tuple[nn.Module, Any]:
    batch = torch.randint(0, 1000, (2, 16, 128))
    return Transformer(1000, 128, 4, 256, 4, tied=False), (batch[0], batch[1])


def perceptron() -> tuple[nn.Module, Any]:
    widths = [512, *[1024] * 6, 16]
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), (torch.randn(512, 512), torch.randint(0, 16, (512,)))


def convolutions() -> tuple[nn.Module, Any]:
    widths = [3, 32, 32, 48, 48, 64]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 10)]
    return nn.Sequential(*layers), (torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,)))


class Recurrent(nn.Module):
    """Two LSTM layers of equal width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.low, self.high = nn.LSTM(width, width), nn.LSTM(width, width)
        self.scores = nn.Linear(width, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.high(self.low(x)[0])[0])


def recurrent() -> tuple[nn.Module, Any]:
    return Recurrent(512), (torch.randn(64, 32, 512), torch.randint(0, 16, (64, 32)))


MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "transformer": transformer,
    "perceptron": perceptron,
    "convolutions": convolutions,
    "recurrent": recurrent,
}


@dataclass
class Configuration:
    """One way to run a model, ready to run. seconds: of its steps so far."""

    name: str
    step: Callable[[], Any]
    seconds: list[float]
    expected_s: float = 0.0
    session: PlacedSession | None = None
    note: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure. Exit status 0."""
    options = argparse.ArgumentParser(prog="python -m bench.placed", description=__doc__)
    options.add_argument("--models", default="transformer,perceptron,convolutions")
    options.add_argument("--workers", default="1,2")
    options.add_argument("--microbatches", default="1,4")
    options.add_argument("--chunks", default="1", help="of time, for models that recur")
    options.add_argument("--search", default="auto")
    options.add_argument("--compile", default="inductor", choices=("eager", "inductor"))
    options.add_argument("--rounds", type=int, default=7)
    given = options.parse_args(arguments)
    torch.set_num_threads(1)
    pairs = []
    for model in given.models.split(","):
        found = measure(model, given)
        alone = found[0]
        for one in found[1:]:
            ratio = statistics.median(a / b for a, b in zip(alone.seconds, one.seconds, strict=True))
            measured_s = statistics.median(one.seconds)
            pairs.append((one.expected_s, measured_s))
            figure = {
                "name": one.name,
                "ratio": round(ratio, 3),
                "expected_ms": round(1e3 * one.expected_s, 2),
                "measured_ms": round(1e3 * measured_s, 2),
                "one_process_ms": round(1e3 * statistics.median(alone.seconds), 2),
                "error": round(abs(one.expected_s - measured_s) / measured_s, 3),
                "search": one.note.split(" was ")[0],
            }
            print(json.dumps(figure), flush=True)
    errors = sorted(abs(expected - measured) / measured for expected, measured in pairs)
    print(json.dumps({"name": "median error", "value": round(statistics.median(errors), 3), "of": len(errors)}))
    if len(pairs) > 2:
        print(json.dumps({"name": "rank correlation", "value": round(rank_correlation(pairs), 3)}))
    return 0


def measure(model: str, given: argparse.Namespace) -> list[Configuration]:
    """All ways to run one model, timed in turn; the first is the whole step in this process."""
    torch.manual_seed(0)
    module, batch = MODELS[model]()
    graph = training_graph(module, classify, torch.optim.AdamW(module.parameters(), lr=1e-4), batch)
    graph = prune(graph, ["loss"], graph.updates)
    whole = Session(graph, compile=given.compile, copy=True)
    found = [Configuration(f"{model} in one process", lambda: whole.run(FETCHES, batch), [])]
    most = max(int(n) for n in given.workers.split(","))
    cluster = local_cluster([1] * most)
    print(
        json.dumps(
            {"name": f"{model}, the most that {most} workers can gain", "ratio": ceiling(graph, batch, cluster, given)}
        )
    )
    try:
        for workers in map(int, given.workers.split(",")):
            some = Cluster(cluster.devices[:workers], cluster.links)
            for chunks in map(int, given.chunks.split(",")):
                name = f"{model}/{workers} workers" + (f"/{chunks} chunks" if chunks > 1 else "")
                for parts in map(int, given.microbatches.split(",")):
                    chunked = time_chunks(graph, chunks)
                    found.append(configure(f"{name}/{parts} parts", chunked, batch, some, parts, given))
                    print(f"  {found[-1].name}: ready", file=sys.stderr, flush=True)
        losses = {round(float(one.step()[1]), 3) for one in found}
        if len(losses) > 1:
            print(f"  {model}: losses differ: {sorted(losses)}", file=sys.stderr)
        for _ in range(given.rounds):
            for one in found:
                one.seconds.append(min(timed(one.step) for _ in range(2)))
    finally:
        for one in found:
            if one.session is not None:
                one.session.close()
    return found


def configure(
    name: str, graph: Graph, batch: Any, cluster: Cluster, parts: int, given: argparse.Namespace
) -> Configuration:
    """One way to run a model over workers, warmed up."""
    fused = given.compile != "eager"
    workers = ProcessWorkers(cluster.devices)
    planner = Planner(lambda whole: place(whole, cluster, search=given.search, fused=fused), fused=fused)
    session = PlacedSession(graph, planner, workers, microbatches=parts, compile=given.compile, timeout_s=600.0)
    session.run(FETCHES, batch)
    session.push()  # begin where the others begin
    assert planner.placement is not None
    return Configuration(
        name,
        lambda: session.run(FETCHES, batch),
        [],
        planner.placement.expected.step_s,
        session,
        planner.placement.plan.note,
    )


def ceiling(graph: Graph, batch: Any, cluster: Cluster, given: argparse.Namespace) -> float:
    """How much more work is done when every worker takes whole steps of its own at once than when only one does.

    The cores share memory, caches and clock: a division without any waiting or sending would gain as much.
    """
    sessions = [
        PlacedSession(graph, all_on(d.name), ProcessWorkers([d]), compile=given.compile, timeout_s=600.0)
        for d in cluster.devices
    ]
    try:
        for session in sessions:
            session.run(FETCHES, batch)
        gains = []
        with ThreadPoolExecutor(len(sessions)) as pool:
            for _ in range(given.rounds):
                alone_s = min(timed(lambda: sessions[0].run(FETCHES, batch)) for _ in range(2))
                both_s = min(
                    timed(lambda: list(pool.map(lambda session: session.run(FETCHES, batch), sessions)))
                    for _ in range(2)
                )
                gains.append(len(sessions) * alone_s / both_s)
    finally:
        for session in sessions:
            session.close()
    return round(statistics.median(gains), 3)


def all_on(device: str) -> Callable[[Graph], list[Piece]]:
    """A placement of everything on one device."""
    return lambda graph: [Piece("all", device, tuple(node.name for node in graph.nodes))]


def timed(step: Callable[[], Any]) -> float:
    """Seconds of one step."""
    start_s = time.perf_counter()
    step()
    return time.perf_counter() - start_s


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's."""
    ranks = []
    for side in zip(*pairs, strict=True):
        order = sorted(range(len(side)), key=side.__getitem__)
        ranks.append([order.index(index) for index in range(len(side))])
    return statistics.correlation(*ranks)


if __name__ == "__main__":
    sys.exit(main())
