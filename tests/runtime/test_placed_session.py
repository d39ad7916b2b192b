"""A session over several devices trains as one over one device does, bit for bit; and says who failed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millrace.errors import FeedError, FetchError, MillraceError, SettingError, WorkerError
from millrace.graph.graph import Graph
from millrace.graph.scopes import scope_of
from millrace.graph.training import training_graph
from millrace.partition.pieces import Piece, greedy_pieces
from millrace.place.cluster import Device
from millrace.runtime.placed_session import PlacedSession
from millrace.runtime.session import Session
from millrace.runtime.thread_workers import ThreadWorkers
from millrace.runtime.workers import ProcessWorkers, Workers

NAMES = ("/host:0/cpu:0", "/host:0/cpu:1")
DEVICES = [Device(name, "cpu", 1 << 30, {}) for name in NAMES]
SOON_S = 30.0


def by_layer(graph: Graph) -> list[Piece]:
    """The first two layers on the first device, the others on the second."""
    return greedy_pieces(
        graph, {node.name: NAMES[0 if scope_of(node).split(".")[0] in ("0", "1") else 1] for node in graph.nodes}
    )


def step_graph(optimizer: Callable[..., Any] = torch.optim.AdamW) -> Graph:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.25), nn.Linear(16, 4)).double()

    def loss(model: nn.Module, batch: Any) -> Any:
        scores = model(batch[0])
        return F.cross_entropy(scores, batch[1]), {"hits": (scores.argmax(-1) == batch[1]).sum(), "scores": scores}

    return training_graph(model, loss, optimizer(model.parameters(), lr=0.01), batch(0))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 6, generator=generator).double(), torch.randint(0, 4, (8,), generator=generator)


@pytest.fixture(params=["threads", "processes"])
def workers(request: pytest.FixtureRequest) -> Iterator[Workers]:
    made: Workers = ThreadWorkers(NAMES) if request.param == "threads" else ProcessWorkers(DEVICES)
    yield made
    made.close()


@pytest.fixture
def processes() -> Iterator[ProcessWorkers]:
    made = ProcessWorkers(DEVICES)
    yield made
    made.close()


def test_training_over_two_devices_is_training_on_one(workers: Workers) -> None:
    graph = step_graph()
    whole = Session(graph, compile="eager", copy=True)
    with PlacedSession(graph, by_layer, workers, compile="eager", timeout_s=SOON_S) as placed:
        assert set(placed.homes.values()) == set(NAMES)
        for seed in range(4):
            names = ["train", "loss", "hits", "scores"]
            for got, expected in zip(placed.run(names, batch(seed)), whole.run(names, batch(seed)), strict=True):
                assert got is expected is None or torch.equal(got, expected)
        assert torch.equal(placed.run("loss", batch(9)), whole.run("loss", batch(9)))
        for name, value in placed.read_all().items():
            assert torch.equal(value, whole.variables[name]), name
        smaller = tuple(t[:3] for t in batch(5))
        assert torch.equal(placed.run(["train", "loss"], smaller)[1], whole.run(["train", "loss"], smaller)[1])
        placed.pull()
        assert torch.equal(placed.variables["0.weight"], whole.variables["0.weight"])
        placed.assign("0.bias", torch.zeros(16))
        assert torch.equal(placed.read("0.bias"), torch.zeros(16).double())
        assert not torch.equal(placed.run("loss", batch(9)), whole.run("loss", batch(9)))


@pytest.mark.parametrize("count", [2, 4])
def test_microbatches_train_as_the_whole_batch_does(count: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    loss = lambda m, b: F.cross_entropy(m(b[0]), b[1])  # noqa: E731
    graph = training_graph(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), batch(0))
    whole = Session(graph, compile="eager", copy=True)
    workers = ThreadWorkers(NAMES)
    with PlacedSession(graph, by_layer, workers, microbatches=count, compile="eager", timeout_s=SOON_S) as placed:
        for seed in range(3):
            torch.testing.assert_close(
                placed.run(["train", "loss"], batch(seed))[1],
                whole.run(["train", "loss"], batch(seed))[1],
                rtol=1e-9,
                atol=0,
            )
        for name, value in placed.read_all().items():
            torch.testing.assert_close(value, whole.variables[name], rtol=1e-9, atol=1e-12)


def test_a_batch_may_hold_a_single_number() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    loss = lambda m, b: F.cross_entropy(m(b[0]) / b[2], b[1])  # noqa: E731
    with_number = (*batch(0), torch.tensor(2.0).double())
    graph = training_graph(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), with_number)
    whole = Session(graph, compile="eager", copy=True)
    with PlacedSession(graph, by_layer, ThreadWorkers(NAMES), compile="eager", timeout_s=SOON_S) as placed:
        names = ["train", "loss"]
        assert torch.equal(placed.run(names, with_number)[1], whole.run(names, with_number)[1])


@pytest.mark.long
def test_segments_are_compiled_in_the_workers(processes: ProcessWorkers) -> None:
    graph = step_graph(torch.optim.SGD)
    whole = Session(graph, compile="eager", copy=True)
    with PlacedSession(graph, by_layer, processes, compile="inductor", timeout_s=300.0) as placed:
        for seed in range(3):
            got, expected = (s.run(["train", "loss"], batch(seed))[1] for s in (placed, whole))
            torch.testing.assert_close(got, expected)
        assert placed.last_tier == "inductor"


def test_the_time_of_every_instruction_is_known(workers: Workers) -> None:
    with PlacedSession(step_graph(), by_layer, workers, compile="eager", timeout_s=SOON_S) as placed:
        placed.watch_time = True
        placed.run(["train", "loss"], batch(0))
        assert placed.timeline is not None
        for device, times in placed.timeline.times.items():
            assert len(times) == len(placed.timeline.partition.programs[device].instructions) + 1
            assert times == sorted(times)


def test_wrong_names_and_batches_are_refused_and_the_session_goes_on() -> None:
    with PlacedSession(step_graph(), by_layer, ThreadWorkers(NAMES), compile="eager", timeout_s=SOON_S) as placed:
        with pytest.raises(FetchError, match="los"):
            placed.run("los", batch(0))
        with pytest.raises(FetchError, match=r"0\.weight"):
            placed.read("0.wait")
        with pytest.raises(FeedError, match="needs the feed"):
            placed.run("loss")
        with pytest.raises(FeedError, match="dtypes must be its own"):
            placed.run("loss", (batch(0)[0].float(), batch(0)[1]))
        with pytest.raises(FeedError, match="99"):
            placed.run("loss", (batch(0)[0], torch.full((8,), 99)))
        with pytest.raises(FeedError, match="shape"):
            placed.assign("0.bias", torch.zeros(3))
        assert placed.run("loss", batch(0)).isfinite()
    with pytest.raises(SettingError, match="evenly"):
        PlacedSession(step_graph(), by_layer, ThreadWorkers(NAMES), microbatches=3)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_hangs_is_named_soon(processes: ProcessWorkers, sign: signal.Signals) -> None:
    timeout_s = 3.0 if sign is signal.SIGSTOP else 60.0
    placed = PlacedSession(step_graph(), by_layer, processes, compile="eager", timeout_s=timeout_s)
    placed.run(["train", "loss"], batch(0))
    victim = processes.pids[NAMES[1]]
    running = threading.Timer(0.3, os.kill, (victim, sign))
    running.start()

    def train_on() -> None:
        for seed in range(1_000_000):
            placed.run(["train", "loss"], batch(seed))

    with pytest.raises(WorkerError, match="cpu:1"):
        train_on()
    with pytest.raises(WorkerError, match="Make it anew"):
        placed.run("loss", batch(0))
    for pid in processes.pids.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_operator_that_fails_is_named_with_its_device(processes: ProcessWorkers) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.embedding((batch[1] * 2).long(), model(batch[0])).sum()

    graph = training_graph(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), (torch.eye(4), torch.zeros(4)))
    placed = PlacedSession(graph, by_layer, processes, compile="eager", timeout_s=SOON_S)
    with pytest.raises(MillraceError, match=r"cpu:1.*(index|range)"):
        placed.run(["train", "loss"], (torch.eye(4), torch.full((4,), 100.0)))


def test_nothing_is_left_when_a_session_is_closed(processes: ProcessWorkers) -> None:
    placed = PlacedSession(step_graph(), by_layer, processes, compile="eager", timeout_s=SOON_S)
    placed.run("loss", batch(0))
    directory = processes.directory
    placed.close()
    placed.close()
    assert not directory.exists()
    for pid in processes.pids.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_table_gets_only_the_rows_that_a_batch_touched() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    words, labels = torch.arange(6).view(2, 3), torch.arange(6) % 3
    loss = lambda m, b: F.cross_entropy(m(b[0]).flatten(0, 1), b[1])  # noqa: E731
    graph = training_graph(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), (words, labels))
    whole = Session(graph, compile="eager", copy=True)
    with PlacedSession(graph, by_layer, ThreadWorkers(NAMES), compile="eager", timeout_s=SOON_S) as placed:
        assert placed.homes["0.weight"] == NAMES[0]
        for _ in range(3):
            got, expected = (s.run(["train", "loss"], (words, labels))[1] for s in (placed, whole))
            assert torch.equal(got, expected)
        assert torch.equal(placed.read("0.weight"), whole.read("0.weight"))
        cut = placed.partition(["train", "loss"], (words, labels))
        assert max(edge.spec.size_bytes for edge in cut.edges) <= 6 * 4 * 8, "the table's whole gradient crosses"
        targets = {str(n.target) for s in cut.programs[NAMES[0]].segments for n in s.graph.nodes}
        assert "aten.index_put.default" in targets
        assert "aten.embedding_dense_backward.default" not in targets
