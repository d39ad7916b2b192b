"""When all processes that held some variables are lost, `fit` goes on from its last checkpoint by itself."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, SupportsFloat

import pytest
import torch
from tests.small import cross_entropy, labelled, mlp

from millrace import Callback, Result, fit
from millrace.errors import VariablesLostError, WorkerError
from millrace.replicas.server_session import ServerSession
from millrace.replicas.session import ReplicatedSession
from millrace.replicas.settings import Async, Hybrid, Sync
from millrace.train.callbacks import RunView
from millrace.train.replicas import ReplicaRun
from millrace.train.restarts import MOST_FROM_ONE_CHECKPOINT, Restarts
from millrace.train.run_directory import RunDirectory

AnyReplicas = ReplicatedSession | ServerSession
INPUTS, LABELS = labelled(48)
SETTINGS: dict[str, Any] = {
    "loss": cross_entropy,
    "batch_size": 8,
    "replicas": 2,
    "spares": 0,
    "compile": "eager",
    "progress": False,
    "seed": 5,
}


class Fault(Callback):
    """Ends processes after some steps, each time that the run comes there."""

    def __init__(self, steps: set[int], hit: Callable[[AnyReplicas], None], *, again: bool = False) -> None:
        self.session: AnyReplicas | None = None
        self.seen: list[int] = []
        self._steps, self._hit, self._again = set(steps), hit, again

    def on_step(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
        self.seen.append(step)
        if step in self._steps:
            assert self.session is not None
            self._hit(self.session)
            if not self._again:
                self._steps.remove(step)


def end(session: AnyReplicas, members: Iterable[str]) -> None:
    """Kill them all before any can take another step."""
    pids = [session._hub._launcher.pids[member] for member in members]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def everybody(session: AnyReplicas) -> None:
    end(session, session.members)


def shard_and_copy(session: AnyReplicas) -> None:
    assert isinstance(session, ServerSession)
    end(session, [member for place in session._pool.places for member in (place.holder, place.copy)])


def run(monkeypatch: pytest.MonkeyPatch, fault: Fault, **settings: Any) -> tuple[Result, dict[str, torch.Tensor]]:
    make = ReplicaRun.session

    def noting(replicas: ReplicaRun, graph: Any) -> AnyReplicas:
        fault.session = make(replicas, graph)
        return fault.session

    monkeypatch.setattr(ReplicaRun, "session", noting)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    result = fit(model, (INPUTS, LABELS), optimizer=optimizer, callbacks=[fault], **SETTINGS | settings)
    return result, {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("update", "hit"), [("sync", everybody), (Sync(parameter_servers=1), shard_and_copy)])
def test_variables_that_nobody_has_any_more_come_from_the_last_checkpoint(
    update: Any, hit: Callable[[AnyReplicas], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was lost is computed again: the run ends as one without faults, bit for bit."""
    plan = {"update": update, "steps": 14, "checkpoint_every": 4, "log_every": 1}
    _, expected = run(monkeypatch, Fault(set(), hit), run_dir=tmp_path / "whole", **plan)
    fault = Fault({6, 11}, hit)
    result, found = run(monkeypatch, fault, run_dir=tmp_path / "hit", **plan)
    assert (result.outcome, result.steps, result.restarts) == ("finished", 14, 2)
    assert fault.seen == [*range(1, 7), *range(5, 12), *range(9, 15)]
    assert result.lost_updates == 2 + 3
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    records = RunDirectory.open(tmp_path / "hit").read_metrics()
    lost = "recovery/lost_updates"
    assert [(r["step"], r[lost]) for r in records if lost in r] == [(4, 2), (8, 3)]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 15))


@pytest.mark.parametrize("update", [Async(), Hybrid(groups=2)])
def test_asynchronous_training_goes_on_from_the_last_checkpoint(
    update: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fault = Fault({20}, shard_and_copy)
    settings = {"update": update, "steps": 30, "checkpoint_every": 8, "progress": True}
    result, _ = run(monkeypatch, fault, run_dir=tmp_path / "run", **settings)
    assert (result.outcome, result.steps, result.restarts) == ("finished", 30, 1)
    assert 4 <= result.lost_updates < 8  # steps that were done when the loss was noticed, since step 16
    said = capfd.readouterr().err
    assert f"{result.lost_updates} updates since step 16 were lost" in said
    assert "shard 0 of the variables is lost" in said


def test_a_resumed_run_tells_of_losses_in_steps_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, Fault(set(), everybody), steps=40, run_dir=tmp_path / "run")
    fault = Fault({43}, lambda session: end(session, session.workers[:1]))
    run(monkeypatch, fault, steps=46, progress=True, run_dir=tmp_path / "run", resume=True)
    assert re.search(r"worker m\d was lost, step 4[34]: its process was killed", capfd.readouterr().err)


def test_a_run_that_gets_nowhere_ends_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Fault({6}, everybody, again=True)
    with pytest.raises(VariablesLostError, match="nobody who has the newest variables") as caught:
        run(monkeypatch, fault, steps=12, checkpoint_every=4, run_dir=tmp_path / "run")
    assert any(f"went back to step 4 {MOST_FROM_ONE_CHECKPOINT} times" in note for note in caught.value.__notes__)
    assert fault.seen.count(6) == 1 + MOST_FROM_ONE_CHECKPOINT
    assert RunDirectory.open(tmp_path / "run").state.status == "failed"


def test_without_a_run_directory_the_error_says_that_there_is_no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VariablesLostError) as caught:
        run(monkeypatch, Fault({3}, everybody), steps=6, run_dir=False)
    assert any("no checkpoint to go on from" in note for note in caught.value.__notes__)


def test_going_back_counts_anew_with_every_checkpoint() -> None:
    restarts = Restarts()
    for saved in (0, 10, 20):
        for _ in range(MOST_FROM_ONE_CHECKPOINT):
            assert f"3 updates since step {saved} were lost" in restarts.note(saved + 3, saved, WorkerError("m0 died"))
    assert (restarts.count, restarts.lost_updates) == (3 * MOST_FROM_ONE_CHECKPOINT, 9 * MOST_FROM_ONE_CHECKPOINT)
    with pytest.raises(WorkerError, match="went back to step 20 3 times"):
        restarts.note(23, 20, WorkerError("m0 died"))
