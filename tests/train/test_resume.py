"""A run that was killed, interrupted or stopped goes on as if nothing had happened, to the last bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, SupportsFloat

import pytest
import torch
from safetensors.torch import load_file
from tests.small import SOURCE, cross_entropy, differing, labelled, mlp, run_program, with_accuracy
from torch import Tensor, nn

import millrace
from millrace import Callback, Checkpoints, EarlyStopping, Result, RunDirectory, fit
from millrace.data import as_batches
from millrace.errors import CheckpointError, DataError, RunDirectoryError, SettingError
from millrace.train.callbacks import RunView

PROGRAM = Path(__file__).with_name("run_to_kill.py")
INPUTS, LABELS = labelled(40)


# -- kills -----------------------------------------------------------------------------------------------------------


def kill(directory: Path, kills: int, seed: int, *scenarios: str) -> dict[str, Any]:
    code = f"import runpy, sys; sys.argv = {['run_to_kill.py', str(directory), str(kills), str(seed), *scenarios]!r}; "
    code += f"sys.path.insert(0, {str(SOURCE)!r}); runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    done = run_program(code, cwd=directory)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.long
@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    scenarios = ["arrays", "epochs", "calls", "loader", "stream", "table", "augmented", "text"]
    found = kill(tmp_path, 2, 1, *scenarios)
    assert {name: outcome["differences"] for name, outcome in found.items()} == {name: [] for name in scenarios}
    assert sum(outcome["deaths"] for outcome in found.values()) >= len(scenarios)


@pytest.mark.long
@pytest.mark.slow
def test_runs_with_worker_processes_survive_kills_as_well(tmp_path: Path) -> None:
    found = kill(tmp_path, 2, 2, "workers", "stateful")
    assert {name: outcome["differences"] for name, outcome in found.items()} == {"workers": [], "stateful": []}
    assert sum(outcome["deaths"] for outcome in found.values()) >= 2


@pytest.mark.long
@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written_a_run_goes_on_from_the_one_before(tmp_path: Path) -> None:
    found = kill(tmp_path, 3, 3, "--save", "arrays", "epochs")
    assert {name: outcome["differences"] for name, outcome in found.items()} == {"arrays": [], "epochs": []}
    assert sum(outcome["deaths"] for outcome in found.values()) >= 3


# -- interrupts, in this process -------------------------------------------------------------------------------------


class Interrupt(Callback):
    """Presses Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
        if step == self._step:
            os.kill(os.getpid(), signal.SIGINT)


class Evaluations(Callback):
    def __init__(self) -> None:
        self.seen: dict[int, Mapping[str, SupportsFloat]] = {}

    def on_evaluate(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
        self.seen[step] = dict(values)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)
    ).double()  # fmt: skip


def run(directory: Path, *callbacks: Callback, weights: int = 0, data: Any = None, **settings: Any) -> Result:
    """One session of a run. The module of a resumed one begins with other weights: those of the run must win."""
    model = network(weights)
    options: dict[str, Any] = {
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.05), "loss": with_accuracy, "epochs": 4, "seed": 5,
        "compile": "eager", "progress": False,
    }  # fmt: skip
    options |= {"batch_size": 8} if data is None else {}
    data = (INPUTS, LABELS) if data is None else data
    return fit(model, data, callbacks=callbacks, run_dir=directory, **(options | settings))


def last(directory: Path) -> dict[str, Tensor]:
    newest = max(RunDirectory.open(directory).checkpoints.glob("step-????????"))
    return load_file(newest / "variables.safetensors")


SETTINGS: dict[str, dict[str, Any]] = {
    "by epochs": {"validation": (INPUTS, LABELS), "early_stopping": EarlyStopping(patience=2, min_delta=0.05)},
    "by steps": {"validation": (INPUTS, LABELS), "evaluate_every": 3, "checkpoint_every": 5},
    "accumulating": {"accumulate": 3},
    "our optimizer": {"accumulate": 2, "optimizer": millrace.optim.adamw(0.05)},
    "steps in one call": {"steps_per_call": 3, "checkpoint_every": 7, "validation": (INPUTS, LABELS)},
    "a schedule": {"schedule": lambda step: 0.9**step},
}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(value, id=name, marks=[pytest.mark.long] if name not in ("by epochs", "steps in one call") else [])
        for name, value in SETTINGS.items()
    ],
)
def test_interrupted_after_any_step_a_run_ends_as_if_it_had_not_been(settings: dict[str, Any], tmp_path: Path) -> None:
    whole = Evaluations()
    result = run(tmp_path / "whole", whole, **settings)
    for step in (1, 5, 6):  # an epoch has five steps: the first, its last, the first of the next
        if step >= result.steps:
            continue
        parts = Evaluations()
        with pytest.raises(KeyboardInterrupt, match=r"SIGINT after step \d+: saved; resume with run_dir="):
            run(tmp_path / f"{step}", Interrupt(step), parts, **settings)
        assert RunDirectory.open(tmp_path / f"{step}").state.status == "interrupted"
        resumed = run(tmp_path / f"{step}", parts, weights=99, resume=True, **settings)
        assert differing(last(tmp_path / f"{step}"), last(tmp_path / "whole")) == []
        assert parts.seen == whole.seen
        assert (resumed.steps, resumed.evaluation) == (result.steps, result.evaluation)


def test_ctrl_c_is_heard_while_batches_change_their_shape_within_one_call(tmp_path: Path) -> None:
    batches = [labelled(8 - n % 2, seed=n) for n in range(40)]
    with pytest.warns(UserWarning, match="traced again"), pytest.raises(KeyboardInterrupt, match=r"after step [3-5]:"):
        run(tmp_path / "run", Interrupt(3), data=batches, steps_per_call=4)


# -- finished runs ---------------------------------------------------------------------------------------------------


def test_a_finished_run_resumed_does_nothing_but_give_its_weights(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"validation": (INPUTS, LABELS)}
    result = run(tmp_path / "run", **settings)
    before, metrics = last(tmp_path / "run"), RunDirectory.open(tmp_path / "run").read_metrics()
    model = network(99)
    again = fit(model, (INPUTS, LABELS), loss=with_accuracy, optimizer=torch.optim.AdamW(model.parameters(), lr=0.05),
                batch_size=8, epochs=4, seed=5, compile="eager", progress=False, run_dir=tmp_path / "run", resume=True,
                **settings)  # fmt: skip
    assert (again.steps, again.outcome, again.evaluation) == (result.steps, "finished", result.evaluation)
    assert differing(last(tmp_path / "run"), before) == []
    assert differing(dict(model.state_dict()), {name: before[name] for name in model.state_dict()}) == []
    assert RunDirectory.open(tmp_path / "run").read_metrics() == metrics


def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    run(tmp_path / "long", epochs=6)
    run(tmp_path / "short", epochs=2)
    run(tmp_path / "short", epochs=6, resume=True, weights=99)
    assert differing(last(tmp_path / "short"), last(tmp_path / "long")) == []
    assert [r["step"] for r in RunDirectory.open(tmp_path / "short").read_metrics()] == [10, 20, 30]


def test_a_run_that_stopped_early_stays_stopped(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "validation": (INPUTS, (LABELS + 1) % 3), "early_stopping": EarlyStopping(patience=1), "epochs": 50,
    }  # fmt: skip
    first = run(tmp_path / "run", **settings)
    assert first.epochs < 50
    again = run(tmp_path / "run", weights=99, resume=True, **settings)
    assert again.steps == first.steps


def test_a_one_shot_stream_is_read_up_to_the_place(tmp_path: Path) -> None:
    def stream() -> Iterator[Any]:
        for n in range(10):
            yield labelled(8, seed=n)

    run(tmp_path / "whole", data=stream(), epochs=1)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", Interrupt(4), data=stream(), epochs=1)
    run(tmp_path / "run", data=stream(), epochs=1, resume=True)
    assert differing(last(tmp_path / "run"), last(tmp_path / "whole")) == []


# -- what may change, and what may not -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seed": 6}, SettingError, "seed was 5 .* cannot become 6 half-way. Resume with seed=5"),
        ({"accumulate": 2}, SettingError, "accumulate was 1"),
        ({"precision": "bfloat16"}, SettingError, "precision was 'float32'"),
        ({"batch_size": 10}, DataError, "batch_size was 8 and is now 10"),
        ({"optimizer": millrace.optim.sgd(0.1)}, CheckpointError, "optimizer"),
    ],
    ids=["seed", "accumulate", "precision", "batch size", "optimizer"],
)
def test_changes_that_would_make_it_another_run_are_refused_and_nothing_is_lost(
    change: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", Interrupt(7))
    with pytest.raises(error, match=message):
        run(tmp_path / "run", resume=True, **change)
    run(tmp_path / "run", resume=True)
    assert differing(last(tmp_path / "run"), last(tmp_path / "whole")) == []


def test_other_settings_may_change(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", Interrupt(7))
    run(tmp_path / "run", resume=True, checkpoint_every=3, keep_last=1, log_every=2, steps_per_call=2)
    assert differing(last(tmp_path / "run"), last(tmp_path / "whole")) == []
    assert RunDirectory.open(tmp_path / "run").config["fit"]["checkpoint_every"] == 3
    assert (tmp_path / "run" / "config.1.json").exists()


def test_the_learning_rate_of_the_checkpoint_stays_and_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", Interrupt(7))
    model = network()
    fit(model, (INPUTS, LABELS), loss=with_accuracy, optimizer=torch.optim.AdamW(model.parameters(), lr=0.5),
        batch_size=8, epochs=4, seed=5, compile="eager", run_dir=tmp_path / "run", resume=True)  # fmt: skip
    assert differing(last(tmp_path / "run"), last(tmp_path / "whole")) == []
    assert "is 0.05 in the checkpoint and stays that, not 0.5" in capsys.readouterr().err


# -- directories -----------------------------------------------------------------------------------------------------


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="No run is at"):
        run(tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_a_run_killed_before_its_first_checkpoint_begins_anew_without_repeats(tmp_path: Path) -> None:
    run(tmp_path / "whole", log_every=2)
    run(tmp_path / "run", log_every=2, steps=6)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    run(tmp_path / "run", log_every=2, resume=True)
    assert differing(last(tmp_path / "run"), last(tmp_path / "whole")) == []
    steps = [r["step"] for r in RunDirectory.open(tmp_path / "run").read_metrics()]
    assert steps == list(range(2, 21, 2))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", Interrupt(7))
    path = tmp_path / "run" / "checkpoints" / "step-00000007" / "variables.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"step-00000007/variables.safetensors.*step 5 is used instead"):
        run(tmp_path / "run", resume=True)
    assert differing(last(tmp_path / "run"), last(tmp_path / "whole")) == []


def test_checkpoints_that_fit_did_not_write_are_refused(tmp_path: Path) -> None:
    run(tmp_path / "run", steps=2)
    saved = Checkpoints(tmp_path / "run" / "checkpoints")
    saved.save(3, last(tmp_path / "run"), {"mine": 1}, wait=True)
    with pytest.raises(CheckpointError, match=r"does not say where in its data the run was.*\['mine'\]"):
        run(tmp_path / "run", resume=True)


# -- used data -------------------------------------------------------------------------------------------------------


def test_batches_that_were_read_before_begin_anew(tmp_path: Path) -> None:
    batches = as_batches((INPUTS, LABELS), batch_size=8, seed=5)
    first, second = mlp(), mlp()
    for model in (first, second):
        result = fit(model, batches, loss=cross_entropy, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
                     steps=7, seed=5, compile="eager", progress=False, run_dir=False)  # fmt: skip
        assert result.steps == 7
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert a.equal(b)
