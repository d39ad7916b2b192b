"""python -m bench.partition: what it costs to cut a graph, on one core.

- "split": layers divided into four blocks, all on one device, against the graph as it was traced, both in this process.
- "workers": the graph cut into four stages for four workers, all on one core, against this process. One of them has
  something to do at a time, so what is more than 1 is what cutting, sending and waiting cost.
- "segment": a chain of tiny operators cut so that each is a segment, against the chain in one segment: microseconds for
  each segment, and for each with a send and a receive that do nothing.
- "pair": a chain of tiny operators whose every link goes from one worker to the other, on two cores: microseconds for a
  segment, a send and a receive. `python -m bench.transports` has what bare gloo and bare copies take.

Ratios are medians over rounds in which both take turns. Prints a JSON line for each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bench.placed import FETCHES, MODELS, classify
from millrace.graph.graph import Graph
from millrace.graph.passes.prune import prune
from millrace.graph.passes.splitting.split import split
from millrace.graph.trace import trace
from millrace.graph.training import training_graph
from millrace.partition.cut import cut
from millrace.partition.pieces import Piece
from millrace.partition.placed import Planner
from millrace.place.cluster import CLASSES, Cluster, Device, Link
from millrace.place.placement import place
from millrace.runtime.device import DeviceRunner
from millrace.runtime.placed_session import PlacedSession
from millrace.runtime.session import Session
from millrace.runtime.workers import ProcessWorkers

PARTS = 4
LINKS = 200  # of the chain of tiny operators
MEMORY_BYTES = 2**33
Step = Callable[[], Any]


def main() -> int:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--compile", default="eager", choices=["eager", "inductor"])
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    overhead_of_pairs(given.rounds)
    os.sched_setaffinity(0, cores[:1])  # the workers inherit it
    overhead_of_segments(given.rounds)
    for model in given.models.split(","):
        on_one_device(model, given)
    return 0


def on_one_device(model: str, given: argparse.Namespace) -> None:
    """The ratios "split" and "workers" of one model."""
    torch.manual_seed(0)
    module, batch = MODELS[model]()
    graph = training_graph(module, classify, torch.optim.AdamW(module.parameters(), lr=1e-4), batch)
    graph = prune(graph, ["loss"], graph.updates)
    whole = Session(graph, compile=given.compile, copy=True)
    blocks = Session(split(graph, PARTS, min_width=256), compile=given.compile, copy=True)
    fused = given.compile != "eager"
    planner = Planner(lambda g: place(g, four_alike(), search="expert", fused=fused), fused=fused)
    workers = ProcessWorkers(four_alike().devices)
    with PlacedSession(graph, planner, workers, compile=given.compile, timeout_s=600.0) as placed:
        steps: dict[str, Step] = {
            name: lambda session=session: session.run(FETCHES, batch)  # type: ignore[misc]
            for name, session in (("whole", whole), ("split", blocks), ("workers", placed))
        }
        seconds = in_turn(steps, given.rounds)
    for name in ("split", "workers"):
        show(f"{model} {name}", "ratio", [a / b for a, b in zip(seconds[name], seconds["whole"], strict=True)])


def four_alike() -> Cluster:
    """Four devices that are this machine's cores; the plan is to divide evenly, so any rates will do."""
    rates = dict.fromkeys(CLASSES, 1e10)
    devices = tuple(Device(f"/host:0/cpu:{n}", "cpu", MEMORY_BYTES, rates) for n in range(PARTS))
    return Cluster(devices, (Link("*", "*", 1e-5, 1e10),))


def chain() -> Graph:
    """Tiny operators, each of which reads the one before; the last one's result is "end"."""

    def step(_: Any, x_1: Tensor) -> dict[str, Tensor]:
        for _ in range(LINKS):
            x_1 = torch.neg(x_1)
        return {"end": x_1}

    return prune(trace(step, {}, torch.ones(1)), ["end"], [])


class NoExchange:
    """Sends and receives that do nothing, for a chain whose values are all alike."""

    value = torch.ones(1)

    def send(self, edge: int, tensor: Tensor) -> None:
        """Drop it."""

    def recv(self, edge: int, timeout_s: float) -> Tensor:
        """The same tensor every time."""
        return self.value


def overhead_of_segments(rounds: int) -> None:
    """Microseconds for a segment with its send and receive, where these do nothing."""
    graph = chain()
    names = [node.name for node in graph.nodes]
    apart = cut(graph, [Piece(str(i), f"device {i % 2}", (name,)) for i, name in enumerate(names)])
    together = cut(graph, [Piece("all", "device 0", tuple(names))])
    feeds: Mapping[str, Tensor] = {f"feed:{feed.name}": torch.ones(1) for feed in graph.feeds}
    steps: dict[str, Step] = {}
    for name, partition in (("apart", apart), ("together", together)):
        runner = DeviceRunner(partition.programs["device 0"], partition.edges, {})
        steps[name] = lambda runner=runner: runner.step(feeds, NoExchange(), 1.0)  # type: ignore[misc]
    segments = len(apart.programs["device 0"].segments)
    seconds = in_turn(steps, rounds, repeat=50)
    nodes = [b * segments / len(names) for b in seconds["together"]]  # what these operators take without a cut
    taken = [1e6 * (a - b) / segments for a, b in zip(seconds["apart"], nodes, strict=True)]
    show("segment, send and receive that do nothing", "microseconds", taken)


def overhead_of_pairs(rounds: int) -> None:
    """Microseconds for a segment, a send and a receive between two worker processes."""
    graph = chain()
    names = [node.name for node in graph.nodes]
    devices = four_alike().devices[:2]

    def pieces(whole: Graph) -> list[Piece]:
        return [Piece(str(i), devices[i % 2].name, (node.name,)) for i, node in enumerate(whole.nodes)]

    def one_piece(whole: Graph) -> list[Piece]:
        return [Piece("all", devices[0].name, tuple(node.name for node in whole.nodes))]

    batch = torch.ones(1)
    with (
        PlacedSession(graph, pieces, ProcessWorkers(devices), compile="eager") as apart,
        PlacedSession(graph, one_piece, ProcessWorkers(devices[:1]), compile="eager") as together,
    ):
        steps: dict[str, Step] = {
            "apart": lambda: apart.run("end", batch),
            "together": lambda: together.run("end", batch),
        }
        seconds = in_turn(steps, rounds, repeat=20)
    taken = [1e6 * (a - b) / len(names) for a, b in zip(seconds["apart"], seconds["together"], strict=True)]
    show("segment, send and receive between processes", "microseconds", taken)
    show(
        "a step of one worker (driver, messages, 200 operators)", "microseconds", [1e6 * s for s in seconds["together"]]
    )


def in_turn(steps: Mapping[str, Step], rounds: int, *, repeat: int = 1) -> dict[str, list[float]]:
    """Seconds of each kind of step in every round: the quickest of three times `repeat` steps."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(min(timed(step, repeat) for _ in range(3)))
    return seconds


def timed(step: Step, repeat: int) -> float:
    """Seconds of one step."""
    start_s = time.perf_counter()
    for _ in range(repeat):
        step()
    return (time.perf_counter() - start_s) / repeat


def show(name: str, unit: str, values: list[float]) -> None:
    """One line of the result."""
    line = {
        "name": name,
        unit: round(statistics.median(values), 3),
        "from": round(min(values), 3),
        "to": round(max(values), 3),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
