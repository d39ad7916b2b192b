"""Runs of tasks: what they leave behind, what opens it again, and how they go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from millrace.data.batches import Batches
from millrace.errors import CheckpointError, RunDirectoryError, SettingError
from millrace.graph.graph import info
from millrace.graph.signature import Phase
from millrace.runtime.checkpoint import Checkpoints
from millrace.train.callbacks import Callback, RunView
from millrace.train.run_directory import RunDirectory
from millrace.zoo.digits import Digits, DigitsSettings
from millrace.zoo.run import (
    RESULT,
    Finished,
    checked_device,
    configure,
    configure_again,
    find_run,
    open_run,
    step_graph,
    total_steps,
    train,
)

QUICK = ["steps=12", "width=4", "compile=eager", "checkpoint_every=5", "evaluate_every=6"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return train(
        configure("digits", QUICK), run_dir=tmp_path_factory.mktemp("runs") / "it", progress=False, device="cpu"
    )


@pytest.fixture(scope="module")
def run(finished: Finished) -> RunDirectory:
    return find_run(str(finished.result.run_dir))


@pytest.fixture
def copy(run: RunDirectory, tmp_path: Path) -> RunDirectory:
    shutil.copytree(run.path, tmp_path / "copy")
    return find_run(str(tmp_path / "copy"))


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, run: RunView, step: int, values: object) -> None:
        if step == self._step:
            run.stop()


def test_a_run_keeps_its_settings_and_its_result(finished: Finished, run: RunDirectory) -> None:
    assert run.config["task"] == "digits"
    assert run.config["settings"]["width"] == 4
    assert run.state.status == "finished"
    kept = json.loads((run.path / RESULT).read_text())
    assert kept == finished.summary("digits")
    assert {"test_accuracy", "steps", "train_s", "first_step_s", "run_dir", "validation_accuracy"} <= kept.keys()
    assert kept["steps"] == 12


class Searching(Digits):
    """A task whose metric is known to `evaluate` alone."""

    metric = "found"
    monitor = "loss"

    def evaluate(self, model: nn.Module, batches: Batches) -> dict[str, float]:
        return {**super().evaluate(model, batches), "found": 0.5}


def test_a_metric_that_only_a_search_tells_needs_no_place_in_the_loss(tmp_path: Path) -> None:
    settings = DigitsSettings(steps=4, width=4, compile="eager", evaluate_every=2, checkpoint_every=2)
    finished = train(Searching(settings), run_dir=tmp_path / "it", progress=False, device="cpu")
    assert finished.test["found"] == 0.5
    assert "found" not in finished.result.evaluation
    assert finished.result.run_dir is not None
    kept = Checkpoints(finished.result.run_dir / "checkpoints")
    assert kept.best() in kept.steps()


def test_a_run_is_opened_with_its_own_weights(run: RunDirectory) -> None:
    opened = open_run(run, "cpu")
    assert (opened.step, opened.task.name(), opened.task.settings.width) == (12, "digits", 4)
    assert not opened.model.training
    fresh = opened.task.model({})
    assert not opened.model.state_dict()["readout.weight"].equal(fresh.state_dict()["readout.weight"])


def test_a_run_stopped_and_resumed_ends_with_the_same_bits(run: RunDirectory, tmp_path: Path) -> None:
    train(configure("digits", QUICK), run_dir=tmp_path / "half", progress=False, device="cpu", callbacks=[StopAt(7)])
    half = find_run(str(tmp_path / "half"))
    again = train(configure_again(half), resume=half, progress=False, device="cpu")
    assert again.result.steps == 12
    whole, resumed = open_run(run, "cpu").model.state_dict(), open_run(half, "cpu").model.state_dict()
    assert [name for name in whole if not whole[name].equal(resumed[name])] == []


def test_a_run_goes_on_for_longer(copy: RunDirectory) -> None:
    longer = train(configure_again(copy, ["steps=15"]), resume=copy, progress=False, device="cpu")
    assert longer.result.steps == 15
    assert find_run(str(copy.path)).config["settings"]["steps"] == 15


def test_what_a_run_was_started_with_stays(copy: RunDirectory) -> None:
    with pytest.raises(SettingError, match="started with width=4"):
        configure_again(copy, ["width=8"])


def test_a_run_of_something_else_is_refused(in_tmp: Path) -> None:
    with RunDirectory.create(Path("runs"), "other", {"mine": 1}):
        pass
    with pytest.raises(RunDirectoryError, match=r"fit\(…, run_dir=…, resume=True\)"):
        configure_again(find_run("other"))


def test_a_run_without_a_checkpoint_is_told_apart(copy: RunDirectory) -> None:
    shutil.rmtree(copy.checkpoints)
    copy.checkpoints.mkdir()
    with pytest.raises(CheckpointError):
        open_run(copy)
    started_over = train(configure_again(copy), resume=copy, progress=False, device="cpu")
    assert started_over.result.steps == 12


def test_a_checkpoint_of_another_model_is_refused(copy: RunDirectory) -> None:
    config = copy.config
    config["settings"]["width"] = 5
    (copy.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"does not fit the model: 'block1.convolution.weight' has shape \[5, 1, 3, 3\]"
    ):
        open_run(copy)


def test_runs_are_found_by_path_name_and_latest(in_tmp: Path) -> None:
    for name in ("one", "two"):
        with RunDirectory.create(Path("runs"), name):
            pass
    assert find_run("one").path == find_run("runs/one").path == Path("runs/one")
    assert find_run("latest").name == "two"
    with pytest.raises(SettingError, match="Did you mean 'one'"):
        find_run("onne")


def test_the_end_of_a_run_is_whichever_comes_first() -> None:
    data = Digits(DigitsSettings()).data()
    assert data.train.batches_per_epoch == 20
    assert total_steps(DigitsSettings(epochs=2), data) == 40
    assert total_steps(DigitsSettings(epochs=2, steps=30), data) == 30
    assert total_steps(DigitsSettings(epochs=None, steps=50), data) == 50
    with pytest.raises(SettingError, match="needs an end"):
        total_steps(DigitsSettings(epochs=None), data)


def test_training_uses_the_threads_that_are_set_and_gives_them_back() -> None:
    seen = []

    class Look(Callback):
        def on_step(self, run: RunView, step: int, values: object) -> None:
            seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    task = configure("digits", [*QUICK, "steps=1", "threads=2"])
    train(task, run_dir=False, progress=False, device="cpu", callbacks=[Look()])
    assert (seen, torch.get_num_threads()) == ([2], before)


def test_devices_are_checked_before_anything_is_done() -> None:
    assert checked_device("cpu") == "cpu"
    with pytest.raises(SettingError, match="'cpuu' cannot be used"):
        checked_device("cpuu")


@pytest.mark.parametrize("task", ["digits", "chars"])
def test_every_task_has_a_step_graph(task: str) -> None:
    graph = step_graph(configure(task, []))
    assert {info(node).phase for node in graph.nodes} == {Phase.FORWARD, Phase.BACKWARD, Phase.UPDATE}
    assert {"loss", configure(task, []).metric} <= set(graph.fetches)
