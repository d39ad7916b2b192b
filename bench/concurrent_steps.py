"""python -m bench.concurrent_steps: asynchronous replicas that push and fetch while they compute, or wait for it.

A model whose variables take about as long to travel as a batch to compute: wide layers, small batches. Two sessions
over parameter servers, which differ in `Async(overlap=…)` alone, take turns; the gain is the median ratio of
neighbouring turns. Prints a JSON line: milliseconds of a batch both ways (best turns), the gain, and the mean staleness
of each. The gain can be up to two where processors are idle while something travels. On one host nothing is idle: what
travels is copied by processors, and on few cores takes them from who computes. So there is `--gbit` too: servers are
reached by TCP, with a pause for every tensor as long as a link of so many gigabits a second needs (`bench.slow_link`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.slow_link import SlowLauncher
from millrace.graph.graph import TRAIN, Graph
from millrace.graph.training import training_graph
from millrace.optim import sgd
from millrace.replicas.hub import Hub
from millrace.replicas.server_session import ServerSession
from millrace.replicas.settings import Async
from millrace.runtime.launch import ProcessLauncher


def wide_model(width: int, depth: int, batch_size: int) -> tuple[Graph, tuple[Tensor, Tensor]]:
    """The step of `depth` layers of width x width, and a batch."""
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
    batch = (torch.randn(batch_size, width), torch.randn(batch_size, width))

    def loss(net: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(net(given[0]), given[1])

    return training_graph(nn.Sequential(*layers), loss, sgd(0.01), batch, seed=0), batch


def started(graph: Graph, workers: int, gbit: float | None, *, overlap: bool) -> ServerSession:
    """A session with processes of its own."""
    directory = tempfile.TemporaryDirectory(prefix="millrace-")
    launcher = ProcessLauncher("millrace.replicas.member", [], 1, Path(directory.name))
    if gbit is not None:
        launcher = SlowLauncher(Path(directory.name), gbit)
    hub = Hub(launcher, secrets.token_bytes(32), Path(directory.name), lambda line: None)
    update = Async(parameter_servers=1, copies=False, overlap=overlap)
    variables = {name: value.detach().clone() for name, value in graph.initial.items()}
    settings = {"replicas": workers, "spares": 0, "compile": "eager", "variables": variables, "directory": directory}
    return ServerSession(graph, hub, update, **settings)


def turn_s(session: ServerSession, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Seconds for a batch."""
    start_s = time.perf_counter()
    for _ in session.stream([TRAIN], batches):
        pass
    return (time.perf_counter() - start_s) / len(batches)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure."""
    options = argparse.ArgumentParser(prog="python -m bench.concurrent_steps", description=__doc__)
    options.add_argument("--width", type=int, default=2048)
    options.add_argument("--depth", type=int, default=4)
    options.add_argument("--batch", type=int, nargs="+", default=[8, 32, 128])
    options.add_argument("--gbit", type=float, help="a second, between servers and workers; on one host if not given")
    options.add_argument("--workers", type=int, default=1)
    options.add_argument("--turns", type=int, default=7)
    options.add_argument("--steps", type=int, default=20, help="in a turn")
    given = options.parse_args(arguments)
    for batch_size in given.batch:
        graph, batch = wide_model(given.width, given.depth, batch_size)
        with contextlib.ExitStack() as stack:
            sessions = [
                stack.enter_context(started(graph, given.workers, given.gbit, overlap=overlap))
                for overlap in (False, True)
            ]
            for session in sessions:
                turn_s(session, [batch] * 5)
            turns = [[turn_s(session, [batch] * given.steps) for session in sessions] for _ in range(given.turns)]
            waits, overlaps = zip(*turns, strict=True)
            figure = {
                "name": "concurrent steps",
                "bytes": sum(value.nbytes for value in graph.initial.values()),
                "gbit": given.gbit,
                "batch": batch_size,
                "workers": given.workers,
                "waiting_ms": round(min(waits) * 1e3, 2),
                "overlapping_ms": round(min(overlaps) * 1e3, 2),
                "gain": round(statistics.median(wait / overlap for wait, overlap in turns), 2),
                "waiting_staleness": round(sessions[0].mean_staleness, 2),
                "overlapping_staleness": round(sessions[1].mean_staleness, 2),
                "turns": given.turns,
            }
            print(json.dumps(figure), flush=True)


if __name__ == "__main__":
    main()
