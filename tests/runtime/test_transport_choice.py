"""Which transport a session's workers use; and over gloo it trains, fails and ends as over shared memory."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from tests.runtime.test_placed_session import SOON_S, batch, step_graph

from millrace.errors import SettingError, WorkerError
from millrace.graph.graph import Graph
from millrace.graph.scopes import scope_of
from millrace.graph.signature import TensorSpec
from millrace.partition.pieces import Piece, greedy_pieces
from millrace.partition.program import Edge
from millrace.place.cluster import Device
from millrace.runtime.placed_session import PlacedSession
from millrace.runtime.session import Session
from millrace.runtime.transport.choose import choose
from millrace.runtime.workers import ProcessWorkers

# All of them are processes of this host, whatever their names say.
TWO_HOSTS = ("/host:0/cpu:0", "/host:1/cpu:0")


def by_layer(graph: Graph) -> list[Piece]:
    first = {node.name: TWO_HOSTS[scope_of(node).split(".")[0] not in ("0", "1")] for node in graph.nodes}
    return greedy_pieces(graph, first)


@pytest.fixture
def workers() -> Iterator[ProcessWorkers]:
    made = ProcessWorkers([Device(name, "cpu", 1 << 30, {}) for name in TWO_HOSTS])
    yield made
    made.close()


def edge(source: str, target: str) -> Edge:
    return Edge(0, source, target, "value", TensorSpec((2,), torch.float32))


def test_memory_is_shared_on_one_host_and_only_there() -> None:
    near, far = edge("/host:0/cpu:0", "/host:0/gpu:1"), edge("/host:0/cpu:0", "/host:1/cpu:0")
    assert choose([near]) == choose([]) == "shared_memory"
    assert choose([near, far]) == "gloo"
    assert choose([near], "gloo") == "gloo"
    with pytest.raises(SettingError, match="joins two hosts"):
        choose([near, far], "shared_memory")


def test_an_unknown_transport_is_refused_before_anything_starts(workers: ProcessWorkers) -> None:
    with pytest.raises(SettingError, match=r"transport='glo'.*Did you mean 'gloo'"):
        PlacedSession(step_graph(), by_layer, workers, transport="glo")
    with pytest.raises(SettingError, match="share no memory"):
        PlacedSession(step_graph(), by_layer, workers, transport="shared_memory", compile="eager").run("loss", batch(0))


def test_training_between_hosts_is_training_in_one_process(workers: ProcessWorkers) -> None:
    graph = step_graph()
    whole = Session(graph, compile="eager", copy=True)
    with PlacedSession(graph, by_layer, workers, compile="eager", timeout_s=SOON_S) as placed:
        assert placed.partition(["train", "loss"]).edges
        for seed in range(4):
            for got, expected in zip(
                placed.run(["train", "loss", "scores"], batch(seed)),
                whole.run(["train", "loss", "scores"], batch(seed)),
                strict=True,
            ):
                assert got is expected is None or torch.equal(got, expected)
        assert torch.equal(placed.run("loss", batch(9)), whole.run("loss", batch(9)))  # another program, another group
        for name, value in placed.read_all().items():
            assert torch.equal(value, whole.variables[name]), name


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_hangs_is_named_soon(workers: ProcessWorkers, sign: signal.Signals) -> None:
    timeout_s = 3.0 if sign is signal.SIGSTOP else 60.0
    placed = PlacedSession(step_graph(), by_layer, workers, compile="eager", timeout_s=timeout_s)
    placed.run(["train", "loss"], batch(0))
    sent_s = [0.0]

    def strike() -> None:
        sent_s[0] = time.monotonic()
        os.kill(workers.pids[TWO_HOSTS[1]], sign)

    def train_on() -> None:
        for seed in range(1_000_000):
            placed.run(["train", "loss"], batch(seed))

    threading.Timer(0.3, strike).start()
    with pytest.raises(WorkerError, match="host:1/cpu:0"):
        train_on()
    # A killed worker is seen at once; a stopped one costs what was allowed, and some grace for who says so.
    assert time.monotonic() - sent_s[0] < (10.0 if sign is signal.SIGKILL else timeout_s + 10.0)
    for pid in workers.pids.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
