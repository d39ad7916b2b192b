"""Workers that are killed, stopped or out of memory in the middle of a step.

Who and why is said soon, and training goes on from the last checkpoint as if nothing had been.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.bad_input.slow_operator import nap
from tests.small import cross_entropy, differing, labelled, mlp
from torch import Tensor, nn

import millrace
from millrace.errors import MillraceError, StepError, WorkerError
from millrace.graph.graph import Graph
from millrace.graph.scopes import scope_of
from millrace.partition.pieces import Piece, greedy_pieces
from millrace.place.cluster import Cluster, Device, Link
from millrace.runtime.placed_session import PlacedSession
from millrace.runtime.session import Session
from millrace.runtime.workers import ProcessWorkers

NAMES = tuple(f"/host:0/cpu:{i}" for i in range(3))
DEVICES = [Device(name, "cpu", 1 << 30, {}) for name in NAMES]
DEATH_S = 5.0  # from a death to its error
LONG_S = 60.0


class Relay(nn.Module):
    """Three layers, of which each device has one; the middle one takes its time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, seconds: Tensor) -> Tensor:
        return self.last(self.middle(nap(self.first(x).tanh(), seconds)))


def step_graph() -> Graph:
    torch.manual_seed(0)
    model = Relay().double()
    loss = lambda m, b: F.cross_entropy(m(b[0], b[2]), b[1])  # noqa: E731
    return millrace.training_graph(model, loss, torch.optim.AdamW(model.parameters(), lr=0.01), batch(0))


def batch(seed: int, seconds: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    return (*labelled(8, seed=seed), torch.tensor(seconds))


def apart(graph: Graph) -> list[Piece]:
    """Each layer on its device; what is outside of them with the middle one, where the napping is."""
    at = {"first": NAMES[0], "middle": NAMES[1], "last": NAMES[2]}
    return greedy_pieces(graph, {node.name: at.get(scope_of(node), NAMES[1]) for node in graph.nodes})


@contextmanager
def session(graph: Graph, timeout_s: float = LONG_S) -> Iterator[tuple[PlacedSession, ProcessWorkers]]:
    workers = ProcessWorkers(DEVICES, imports=["tests.bad_input.slow_operator"])
    with PlacedSession(graph, apart, workers, compile="eager", timeout_s=timeout_s) as placed:
        yield placed, workers


@contextmanager
def after(delay_s: float, pid: int, sign: signal.Signals) -> Iterator[list[float]]:
    """Send a signal meanwhile; gives the moment at which it was sent."""
    sent: list[float] = []

    def send() -> None:
        sent.append(time.monotonic())
        os.kill(pid, sign)

    timer = threading.Timer(delay_s, send)
    timer.start()
    try:
        yield sent
    finally:
        timer.cancel()


def all_gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def killed_in_a_step(placed: PlacedSession, workers: ProcessWorkers, victim: str) -> None:
    """Kill a worker while the middle one naps; assert that this is told soon, and that nobody is left."""
    pids = list(workers.pids.values())
    with after(0.5, workers.pids[victim], signal.SIGKILL) as sent, pytest.raises(WorkerError) as caught:
        placed.run(["train", "loss"], batch(9, seconds=30.0))
    assert time.monotonic() - sent[0] < DEATH_S
    assert f"the worker of {victim} (process {workers.pids[victim]}) has ended" in str(caught.value)
    assert "killed by SIGKILL" in str(caught.value)
    assert "restore the last checkpoint" in str(caught.value)
    assert all_gone(pids)
    with pytest.raises(WorkerError, match="Make it anew"):
        placed.run("loss", batch(0))


def test_after_a_death_training_goes_on_with_the_numbers_of_a_run_without_one(tmp_path: Path) -> None:
    graph = step_graph()
    whole = Session(graph, compile="eager", copy=True)
    expected = [float(whole.run(["train", "loss"], batch(seed))[1]) for seed in range(5)]
    with session(graph) as (placed, workers):
        losses = [float(placed.run(["train", "loss"], batch(seed))[1]) for seed in range(2)]
        placed.save(tmp_path / "variables.safetensors")
        placed.run(["train", "loss"], batch(8))  # a step that is lost
        killed_in_a_step(placed, workers, NAMES[1])
    with session(graph) as (placed, _):
        placed.restore(tmp_path / "variables.safetensors")
        losses += [float(placed.run(["train", "loss"], batch(seed))[1]) for seed in range(2, 5)]
        assert losses == expected
        assert differing(placed.read_all(), dict(whole.variables)) == []


def test_a_death_is_told_while_others_are_busy_and_do_not_hear_of_it() -> None:
    with session(step_graph()) as (placed, workers):
        placed.run(["train", "loss"], batch(0))
        killed_in_a_step(placed, workers, NAMES[0])


def test_a_stopped_worker_is_named_and_who_waited_for_whom() -> None:
    timeout_s = 2.0
    with session(step_graph(), timeout_s) as (placed, workers):
        placed.run(["train", "loss"], batch(0))
        pids, stopped = list(workers.pids.values()), workers.pids[NAMES[0]]
        os.kill(stopped, signal.SIGSTOP)
        began_s = time.monotonic()
        with pytest.raises(WorkerError) as caught:
            placed.run(["train", "loss"], batch(1))
        assert time.monotonic() - began_s < timeout_s + 6.0
        assert f"the worker of {NAMES[0]} (process {stopped}) did not answer within" in str(caught.value)
        waited = caught.value.__cause__  # the last one waits for the middle one, which waits for the stopped one
        assert isinstance(waited, WorkerError)
        assert f"waited {timeout_s:g} s in step" in str(waited)
        assert all_gone(pids), "a stopped one, too"


def test_a_worker_that_runs_out_of_memory_in_a_step_says_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 64))
    graph = millrace.training_graph(
        model, lambda m, x: m(x).square().mean(), torch.optim.SGD(model.parameters(), lr=0.1), torch.ones(8, 4)
    )
    first = lambda g: greedy_pieces(g, {n.name: NAMES[scope_of(n) == "1"] for n in g.nodes})  # noqa: E731
    small = [DEVICES[0], Device(NAMES[1], "cpu", 32 << 20, {})]
    with PlacedSession(graph, first, ProcessWorkers(small, hold_to_memory=True), compile="eager") as placed:
        placed.run(["train", "loss"], torch.ones(8, 4))
        began_s = time.monotonic()
        with pytest.raises(
            MillraceError
        ) as caught:  # 256 MB of results on a device that may take 32 and 128 for libraries
            placed.run(["train", "loss"], torch.ones(1_000_000, 4))
        assert time.monotonic() - began_s < 20.0  # with tracing and cutting for the new shape
        assert isinstance(caught.value, StepError | WorkerError)
        assert "/host:0/cpu:1" in str(caught.value)
        assert "memory" in str(caught.value)


def test_workers_that_cannot_start_say_why() -> None:
    with pytest.raises(MillraceError, match=r"/host:0/cpu:0.*No module named 'no_such_module'"):
        ProcessWorkers(DEVICES[:1], imports=["no_such_module"])


def test_a_worker_that_dies_while_a_program_is_loaded_is_named() -> None:
    """The others wait for it to connect, for as long as a minute if nobody told them."""
    with session(step_graph()) as (placed, workers):
        os.kill(workers.pids[NAMES[2]], signal.SIGSTOP)
        victim = workers.pids[NAMES[2]]
        with after(0.5, victim, signal.SIGKILL) as sent, pytest.raises(WorkerError, match=f"process {victim}.*SIGKILL"):
            placed.run(["train", "loss"], batch(0))
        assert time.monotonic() - sent[0] < DEATH_S


def test_a_worker_that_died_between_two_steps_is_named() -> None:
    with session(step_graph()) as (placed, workers):
        placed.run(["train", "loss"], batch(0))
        victim = workers.pids[NAMES[1]]
        os.kill(victim, signal.SIGKILL)
        os.waitid(os.P_PID, victim, os.WEXITED | os.WNOWAIT)  # so that sending to it fails already
        with pytest.raises(WorkerError, match=f"process {victim}.*SIGKILL"):
            placed.run(["train", "loss"], batch(1))


RATES = {"product": 1e9, "convolution": 1e9, "attention": 1e9, "memory": 1e9}
TWO = Cluster(tuple(Device(name, "cpu", 1 << 30, RATES, 1e-6) for name in NAMES[:2]), (Link("*", "*", 1e-5, 1e9),))


class Kills(millrace.Callback):
    """Kills a worker of this process after some steps."""

    killed_at: float = 0.0

    def on_step(self, run: Any, step: int, values: Any) -> None:
        del run, values
        if step == 7:
            workers = [
                int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and self._is_worker(entry)
            ]
            assert len(workers) == 2
            self.killed_at = time.monotonic()
            os.kill(max(workers), signal.SIGKILL)

    @staticmethod
    def _is_worker(entry: Path) -> bool:
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            return parent == os.getpid() and "device_worker" in (entry / "comm").read_text()
        except (OSError, ValueError):
            return False


def test_a_run_whose_worker_dies_is_resumed_to_the_same_end(tmp_path: Path) -> None:
    batches = [labelled(8, seed=seed) for seed in range(5)]

    def trained(name: str, **settings: Any) -> nn.Module:
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        usual: dict[str, Any] = {"devices": TWO, "placement": {"0": "cpu:0", "2": "cpu:1"}}
        millrace.fit(
            model, batches, loss=cross_entropy, optimizer=optimizer, epochs=3, run_dir=tmp_path / name,
            compile="eager", progress=False, **{**usual, **settings},
        )  # fmt: skip
        return model

    killer = Kills()
    with pytest.raises(WorkerError, match="killed by SIGKILL"):
        trained("run", callbacks=[killer])
    assert time.monotonic() - killer.killed_at < DEATH_S
    assert millrace.RunDirectory.open(tmp_path / "run").state.status == "failed"
    resumed, whole = trained("run", resume=True), trained("whole", devices=None, placement=None)
    assert differing(dict(resumed.state_dict()), dict(whole.state_dict())) == []
