"""Gradients added up while others are computed, against afterwards: `python -m bench.overlap`.

Two workers train layers of equal size. Sessions take their steps in turn; a ratio is the median over the rounds of the
time with overlap / without in the same round. `--gbit 1` puts the whole run into a network of its own whose loopback
lets so much through, both ways together (Linux, root), which is what gloo then has between the workers: no host's
clock or driver, but the waits of a slow network. Prints one JSON line per figure.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import secrets
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from millrace.graph.graph import TRAIN, Graph
from millrace.graph.training import training_graph
from millrace.replicas.hub import Hub
from millrace.replicas.rendezvous import Rendezvous
from millrace.replicas.session import ReplicatedSession
from millrace.replicas.settings import Travel
from millrace.runtime.launch import ProcessLauncher

_CLONE_NEWNET = 0x40000000  # of Linux's sched.h

Batch = tuple[Tensor, Tensor]


def step_of(layers: int, width: int, batch_size: int) -> tuple[Graph, Batch]:
    torch.manual_seed(0)
    net = nn.Sequential(*[layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.Tanh())])
    batch = torch.randn(batch_size, width), torch.randn(batch_size, width)
    return training_graph(net, _loss, torch.optim.SGD(net.parameters(), lr=0.01), batch), batch


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def session_of(graph: Graph, asked: argparse.Namespace, transport: str, overlap: bool) -> ReplicatedSession:
    directory = tempfile.TemporaryDirectory(prefix="millrace-")
    path = Path(directory.name)
    hub = Hub(ProcessLauncher("millrace.replicas.member", [], 1, path), secrets.token_bytes(32), path, print)
    return ReplicatedSession(
        graph,
        hub,
        Rendezvous(),
        replicas=asked.replicas,
        spares=0,
        variables={name: value.detach().clone() for name, value in graph.initial.items()},
        compile=asked.compile,
        patience_s=60.0,
        travel=Travel(transport, overlap=overlap),
        directory=directory,
    )


def times_of(sessions: list[ReplicatedSession], batch: Batch, rounds: int) -> list[list[float]]:
    """Seconds of each round, by session; the first two warm up."""
    found: list[list[float]] = [[] for _ in sessions]
    for number in range(rounds + 2):
        for session, times in zip(sessions, found, strict=True):
            begun_s = time.perf_counter()
            session.run([TRAIN, "loss"], batch)
            if number >= 2:
                times.append(time.perf_counter() - begun_s)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256, 1024], help="examples, of all workers")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", default="eager")
    parser.add_argument("--transport", nargs="+", default=["shared_memory", "gloo"])
    parser.add_argument("--gbit", type=float, help="of the network, per second")
    asked = parser.parse_args()
    if asked.gbit:
        _into_slow_network(asked.gbit)
    torch.set_num_threads(1)
    for batch_size in asked.batch:
        graph, batch = step_of(asked.layers, asked.width, batch_size)
        for transport in asked.transport:
            with contextlib.ExitStack() as stack:
                sessions = [
                    stack.enter_context(session_of(graph, asked, transport, overlap)) for overlap in (False, True)
                ]
                plain_s, overlapped_s = times_of(sessions, batch, asked.rounds)
                first, second = (session.read_all() for session in sessions)
                ratios = sorted(b / a for a, b in zip(plain_s, overlapped_s, strict=True))
                figure = {
                    "what": f"overlap, {transport}" + (f", {asked.gbit:g} Gbit/s" if asked.gbit else ""),
                    "replicas": asked.replicas,
                    "examples": batch_size,
                    "gradient_bytes": sum(v.nbytes for v in graph.initial.values()),
                    "compile": asked.compile,
                    "plain_ms": round(statistics.median(plain_s) * 1e3, 1),
                    "overlapped_ms": round(statistics.median(overlapped_s) * 1e3, 1),
                    "least_ms": [round(min(plain_s) * 1e3, 1), round(min(overlapped_s) * 1e3, 1)],
                    "ratio": round(statistics.median(ratios), 3),
                    "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
                    "same_bits": all(torch.equal(first[name], second[name]) for name in first),
                }
                print(json.dumps(figure), flush=True)


def _into_slow_network(gbit: float) -> None:
    """Leave this machine's network for one of this process and its children, which has a slow loopback and no more."""
    if ctypes.CDLL(None).unshare(_CLONE_NEWNET):
        raise SystemExit("a network of its own was refused: --gbit needs root")
    shape = f"tc qdisc add dev lo root tbf rate {gbit * 1e3:.0f}mbit burst 1mb latency 50ms"
    for command in ("ip link set lo up", shape):
        if os.system(command):
            raise SystemExit(f"{command!r} failed: --gbit needs root, ip and tc (iproute2), and the kernel's sch_tbf")


if __name__ == "__main__":
    main()
