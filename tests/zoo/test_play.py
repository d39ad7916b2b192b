"""Play: the step against its formulas, a run that learns, resumes and ends, predictions, and divided runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from millrace.errors import DataError, SettingError
from millrace.graph.training import training_graph
from millrace.models.games import Kind
from millrace.models.q_learning import Learner, Values
from millrace.runtime.session import Session
from millrace.zoo.play import Play
from millrace.zoo.run import Division, configure, configure_again, find_run, open_run, train

QUICK = ["compile=eager", "warm_up=200", "batch_size=16", "matches=4", "rows=8", "games=4", "width=32", "every=4"]
PICTURES = ["game=ALE/Pong-v5", "matches=1", "longest=60", "warm_up=64", "capacity=400", "games=2", "rows=8"]


def learner(double: bool = True, dueling: bool = False, errors: int = 0, every: int = 3) -> Learner:
    torch.manual_seed(0)
    return Learner(Values(Kind((3,), "float32", 1, 4), 8, dueling), every, double, errors).double().train()


def batch(count: int = 5, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "observations": torch.randn(count, 1, 3, dtype=torch.float64, generator=generator),
        "actions": torch.randint(4, (count,), generator=generator),
        "rewards": torch.randn(count, dtype=torch.float64, generator=generator),
        "after": torch.randn(count, 1, 3, dtype=torch.float64, generator=generator),
        "discounts": torch.tensor([0.9, 0.0] * count, dtype=torch.float64)[:count],
        "weights": torch.rand(count, dtype=torch.float64, generator=generator),
        "scores": torch.full((count,), 2.0, dtype=torch.float64),
    }


def play(*settings: str) -> Play:
    task = configure("play", [*QUICK, *settings])
    assert isinstance(task, Play)
    return task


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dueling", [False, True])
def test_targets_are_those_of_the_papers(double: bool, dueling: bool) -> None:
    model, given = learner(double, dueling, every=100), batch()
    model(given)  # the target's weights are those of now
    with torch.no_grad():
        for parameter in model.online.parameters():
            parameter.add_(
                torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            )
        value, target = model(given)
        for n in range(5):
            now, after = given["observations"][n], given["after"][n]
            assert float(value[n]) == pytest.approx(float(model.online(now[None])[0, given["actions"][n]]))
            chooser = model.online if double else model.target
            best = int(chooser(after[None])[0].argmax())
            ahead = 0.0 if n % 2 else 0.9 * model.target(after[None])[0, best]
            assert float(target[n]) == pytest.approx(float(given["rewards"][n] + ahead))


def test_the_step_copies_the_target_as_often_as_asked_for() -> None:
    model, task = learner(every=3, errors=5), play()
    graph = training_graph(model, task.loss, task.optimizer(model, 10), batch())
    session = Session(graph, compile="eager")
    before = model.online.advantages.weight.detach().clone()  # type: ignore[union-attr]
    for step in range(7):
        if step % 3 == 0:
            before = model.online.advantages.weight.detach().clone()  # type: ignore[union-attr]
        session.run(["train"], batch(seed=step))
        assert model.target.advantages.weight.equal(before)  # type: ignore[union-attr, operator]
        assert not model.online.advantages.weight.equal(before)  # type: ignore[union-attr, operator]
    assert int(model.steps) == 7
    value, target = (found.detach() for found in model.eval()(batch(seed=9)))
    assert model.errors is not None
    assert torch.allclose(model.errors, target - value)


def test_weights_scale_what_is_learned() -> None:
    model, task = learner(), play()
    light, heavy = batch(), batch()
    heavy["weights"] = 2 * light["weights"]
    assert float(task.loss(model, heavy)[0].detach()) == pytest.approx(2 * float(task.loss(model, light)[0].detach()))


@pytest.mark.parametrize(
    "variant", [pytest.param("double=false", marks=pytest.mark.long), "dueling=true", "prioritized=true"]
)
def test_every_variant_runs_and_repeats(variant: str) -> None:
    runs = [train(play(variant, "steps=40"), run_dir=False, progress=False, device="cpu") for _ in range(2)]
    assert runs[0].result.values == runs[1].result.values
    assert runs[0].test == runs[1].test


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    begun = train(play("steps=60", "checkpoint_every=30"), run_dir=tmp_path / "run", progress=False, device="cpu")
    run = find_run(str(begun.result.run_dir))
    first = open_run(run)
    assert int(first.model.steps) == 60
    finished = train(configure_again(run, ["steps=100"]), resume=run, progress=False, device="cpu")
    assert finished.result.steps == 100
    last = open_run(run)
    assert int(last.model.steps) == 100
    assert not torch.equal(first.model.online.advantages.weight, last.model.online.advantages.weight)
    # The target is of the last multiple of target_every, which came before the checkpoint of step 60.
    assert torch.equal(first.model.target.advantages.weight, last.model.target.advantages.weight)


@pytest.mark.long
@pytest.mark.parametrize("update", [None, "sync", "async"])
def test_the_same_task_divided(update: str | None) -> None:
    division = Division(partitions=2) if update is None else Division(replicas=2, update=update)
    with_processes = train(play("steps=48"), run_dir=False, progress=False, device="cpu", division=division)
    assert with_processes.result.steps == 48
    assert with_processes.test["score"] >= 8
    if update != "async":
        alone = train(play("steps=48"), run_dir=False, progress=False, device="cpu")
        assert with_processes.result.values["loss"] == pytest.approx(alone.result.values["loss"], rel=1e-3)
        assert with_processes.test["score"] == alone.test["score"]


def test_pictures_are_learned_from_and_shown(tmp_path: Path) -> None:
    task = configure("play", [*QUICK, *PICTURES, "steps=3", "compile=eager"])
    finished = train(task, run_dir=tmp_path / "run", progress=False, device="cpu")
    assert -3 <= finished.test["score"] <= 0
    opened = open_run(find_run(str(finished.result.run_dir)))
    asked = tmp_path / "pong.txt"
    asked.write_text("ALE/Pong-v5 3\n")
    said = opened.task.predict(opened.model, asked, opened.facts)
    again = opened.task.predict(opened.model, asked, opened.facts)
    assert said.text == again.text
    assert said.pictures["film"].equal(again.pictures["film"])
    assert said.pictures["film"].shape[1:] == (1, 84, 84)
    with Image.open(tmp_path / "run" / "pictures" / "film.png") as film:
        assert film.n_frames > 10
        assert film.size == (84, 84)
    asked.write_text("CartPole-v1")
    with pytest.raises(DataError, match="Ask for a game of that kind"):
        opened.task.predict(opened.model, asked, opened.facts)


def test_a_prediction_is_a_game_that_can_be_repeated(tmp_path: Path) -> None:
    task = play()
    facts = task.data().facts
    model = task.model(facts)
    asked = tmp_path / "game.txt"
    scores = []
    for words in ("CartPole-v1 7", "CartPole-v1 7", "CartPole-v1\n", "CartPole-v0 7"):
        asked.write_text(words)
        scores.append(task.predict(model, asked, facts).values)
    assert scores[0] == scores[1]
    assert scores[2] == {"game": "CartPole-v1", "seed": 0, "score": scores[2]["score"]}
    assert task.predict(model, asked, facts).pictures["numbers"].shape[:2] == (1, 4 * 68 - 4)
    with pytest.raises(DataError, match="must name a game"):
        task.predict(model, tmp_path / "missing.txt", facts)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(SettingError, match="needs to know its steps"):
        play("steps=none")
    with pytest.raises(SettingError, match="steps_per_call=1"):
        play("prioritized=true", "steps_per_call=2")
    assert play().settings.capacity == 50_000
    assert play("game=ALE/Pong-v5").settings.learning_rate == 1e-4


def children_of(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGKILL])
def test_nothing_is_left_behind(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "millrace", "train", "play", "--run-dir", str(tmp_path / "run"), "--device", "cpu"]
    command += [argument for pair in [*QUICK, "steps=100000", "actors=2"] for argument in ("--set", pair)]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("run/metrics*")) and time.monotonic() < deadline:
        assert run.poll() is None, run.stderr and run.stderr.read()
        time.sleep(0.1)
    time.sleep(0.5)
    below = children_of(run.pid)
    assert len(below) >= 3  # two actors and the process that made them
    os.kill(run.pid, number)
    run.communicate(timeout=100)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in below) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in below if Path(f"/proc/{pid}").exists()] == []
    if number == signal.SIGINT:
        state: dict[str, Any] = json.loads((tmp_path / "run" / "state.json").read_text())
        assert state["status"] == "interrupted"


@pytest.mark.long
def test_cartpole_is_solved() -> None:
    """Averaged over 100 games that training never saw; CartPole-v1 counts as solved at 475."""
    task = configure("play", ["compile=eager", "evaluate_every=100000", "checkpoint_every=100000"])
    finished = train(task, run_dir=False, progress=False, device="cpu")
    assert finished.test["score"] >= 475
