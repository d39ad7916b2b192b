"""Steps that raise errors, or need more memory than there is, in one process of a run."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.fragile import DIRECTORY, FIRST_S, fragile
from tests.replicas.real_session import pid_of, session_over
from torch import Tensor, nn

from millrace.errors import MillraceError, OutOfMemoryError, StepError
from millrace.graph.graph import TRAIN, Graph
from millrace.graph.training import training_graph
from millrace.replicas.members_session import MembersSession
from millrace.replicas.settings import Async, Sync
from millrace.runtime.launch import Launcher, ProcessLauncher
from millrace.runtime.session import Session

UPDATES = [Sync(), Sync(parameter_servers=1), Async()]
NAMES = ["collective", "servers", "async"]
BATCH = torch.arange(24.0, dtype=torch.float64).reshape(6, 4) / 24


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of faults; members find it."""
    directory = tmp_path / "faults"
    directory.mkdir()
    monkeypatch.setenv(DIRECTORY, str(directory))
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    return directory


def members_in(*arguments: str) -> Callable[[Path], Launcher]:
    return lambda directory: ProcessLauncher(
        "millrace.replicas.member", ["--imports", "bench.fragile", *arguments], 1, directory
    )


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return fragile(model(x)).square().mean()  # the user's line


def graph_of() -> Graph:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    return training_graph(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), BATCH)


def losses(session: Session | MembersSession, steps: int) -> list[float]:
    found = session.stream([TRAIN, "loss"], [BATCH] * steps)
    return [float(value) for (_, value), _ in found]


def add(directory: Path, kind: str, count: int = 1) -> None:
    for number in range(count):
        (directory / f"{kind}-{number}").touch()


@pytest.mark.parametrize("update", UPDATES, ids=NAMES)
def test_an_error_ends_the_run_and_names_worker_step_and_line(update: Any, faults: Path) -> None:
    with session_over(graph_of(), update, 2, launcher_in=members_in()) as session:
        losses(session, 2)
        add(faults, "raise", 40)
        with pytest.raises(StepError) as caught:
            losses(session, 1)
    said = str(caught.value)
    assert said.startswith("worker m")
    assert "step 3: the step failed at" in said
    assert "test_failing_steps.py:" in said
    assert "in loss" in said
    assert "the user's own operator failed" in said


@pytest.mark.parametrize("kind", ["raise", "memory"])
@pytest.mark.parametrize("update", UPDATES, ids=NAMES)
def test_who_failed_is_replaced_and_the_run_goes_on(update: Any, kind: str, faults: Path) -> None:
    """An error of the user's only if that was asked for; lack of memory always, as another process may have more."""
    expected = losses(Session(graph_of(), compile="eager", copy=True), 6)
    said: list[str] = []
    settings = {"drop_failing": kind == "raise", "say": said.append, "launcher_in": members_in()}
    with session_over(graph_of(), update, 2, spares=1, **settings) as session:
        found = losses(session, 3)
        add(faults, kind)
        found += losses(session, 3)
    assert not list(faults.iterdir())
    if update != Async():
        assert found == pytest.approx(expected, rel=1e-9)
    assert found[-1] < found[0]
    (line,) = [line for line in said if "It is replaced." in line]
    assert ("it ran out of memory" in line) == (kind == "memory")


@pytest.mark.parametrize("update", [UPDATES[0], *(pytest.param(u, marks=pytest.mark.long) for u in UPDATES[1:])])
def test_the_first_step_of_a_replacement_may_take_longer_than_steps_do(
    update: Any, faults: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FIRST_S, "4")
    said: list[str] = []
    settings = {"say": said.append, "launcher_in": members_in(), "patience_s": 1.0}
    with session_over(graph_of(), update, 2, spares=1, **settings) as session:
        losses(session, 2)
        before = list(session.workers)
        os.kill(pid_of(session, before[0]), signal.SIGKILL)
        for _ in session.stream([TRAIN, "loss"], itertools.repeat(BATCH)):
            if session.complete and before[0] not in session.workers:
                break
        losses(session, 2)
        assert before[1] in session.workers
    lost = [line for line in said if "was lost" in line or "stuck" in line]
    assert len(lost) == 1, said


@pytest.mark.parametrize("update", UPDATES, ids=NAMES)
def test_a_step_that_fails_in_every_process_ends_the_run(update: Any, faults: Path) -> None:
    settings = {"drop_failing": True, "say": lambda line: None, "launcher_in": members_in()}
    with session_over(graph_of(), update, 2, spares=1, **settings) as session:
        losses(session, 1)
        add(faults, "raise", 40)
        with pytest.raises(StepError, match=r"(?s)the step failed at .* \d processes have failed in this step"):
            losses(session, 1)


@pytest.mark.parametrize("update", UPDATES[:2], ids=NAMES[:2])
def test_what_no_process_has_memory_for_ends_the_run_and_says_what_to_do(update: Any, faults: Path) -> None:
    """Members that are held to little memory; a slice that fits goes on, one that does not says so."""

    def wide(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).exp().square().mean()

    torch.manual_seed(0)
    model = nn.Linear(1, 64)
    graph = training_graph(model, wide, torch.optim.SGD(model.parameters(), lr=1e-3), torch.ones(8, 1))
    settings = {"say": lambda line: None, "launcher_in": members_in("--memory-bytes", str(32 << 20))}
    with session_over(graph, update, 2, **settings) as session:
        session.run([TRAIN, "loss"], torch.ones(8, 1))
        session.run([TRAIN, "loss"], torch.ones(80_000, 1))  # 10 MB in each slice's tensors
        with pytest.raises(OutOfMemoryError) as caught:  # 256 MB
            session.run([TRAIN, "loss"], torch.ones(2_000_000, 1))
    assert "it ran out of memory" in str(caught.value)
    assert "a smaller batch, more replicas" in str(caught.value)
    assert isinstance(caught.value, MillraceError)
