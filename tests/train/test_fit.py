"""`fit` trains what a hand-written loop would train, from data and losses of every kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, SupportsFloat

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.small import cross_entropy, labelled, mlp, with_accuracy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import millrace
from millrace import Callback, EarlyStopping, RunDirectory, Session, fit
from millrace.errors import SettingError, TraceError
from millrace.train.callbacks import RunView

QUIET: dict[str, Any] = {"compile": "eager", "progress": False, "run_dir": False}


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Any]) -> list[float]:
    """The loop that everybody writes."""
    losses = []
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        loss = cross_entropy(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class Losses(Callback):
    """Every step's loss."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_step(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
        self.values.append(float(values["loss"]))


def batch_norm_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()


@pytest.mark.parametrize("make", [mlp, batch_norm_net])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.AdamW(p, lr=0.01),
        lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    ],
    ids=["nesterov", "adamw", "rmsprop"],
)
def test_the_users_module_ends_as_in_a_loop_by_hand(make: Callable[[], nn.Module], optimizer: Any) -> None:
    mine, twin = make(), make()
    batches = [labelled(8, seed=n) for n in range(6)]
    losses = Losses()
    fit(
        mine, batches, loss=cross_entropy, optimizer=optimizer(mine.parameters()), epochs=2, callbacks=[losses], **QUIET
    )
    expected = by_hand(twin, optimizer(twin.parameters()), batches * 2)
    assert losses.values == pytest.approx(expected, rel=1e-9)
    for (name, tensor), other in zip(mine.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, other, rtol=0, atol=1e-9, msg=name)


def test_float32_follows_the_loop_by_hand() -> None:
    mine, twin = mlp(torch.float32), mlp(torch.float32)
    batches = [labelled(8, torch.float32, seed=n) for n in range(20)]
    losses = Losses()
    fit(mine, batches, loss=cross_entropy, optimizer=torch.optim.Adam(mine.parameters()), epochs=1,
        callbacks=[losses], **QUIET)  # fmt: skip
    assert losses.values == pytest.approx(by_hand(twin, torch.optim.Adam(twin.parameters()), batches), rel=1e-4)


def test_our_own_optimizer_is_torchs() -> None:
    ours, theirs = mlp(), mlp()
    batches = [labelled(8, seed=n) for n in range(10)]
    fit(ours, batches, loss=cross_entropy, optimizer=millrace.optim.adamw(0.01), epochs=1, **QUIET)
    by_hand(theirs, torch.optim.AdamW(theirs.parameters(), lr=0.01), batches)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-7)


# -- data ----------------------------------------------------------------------------------------------------------


class Pairs(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return INPUTS[index], LABELS[index]


INPUTS, LABELS = labelled(24)


def in_batches() -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, 24, 8):
        yield INPUTS[start : start + 8], LABELS[start : start + 8]


def dict_loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"].double()), batch["y"])


def table() -> Any:
    rows = {"x": INPUTS.numpy().astype(np.float64), "y": LABELS.numpy()}
    features = datasets.Features(
        {"x": datasets.Sequence(datasets.Value("float64"), length=4), "y": datasets.Value("int64")}
    )
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize(
    ("data", "batch_size", "loss"),
    [
        ((INPUTS, LABELS), 8, cross_entropy),
        ((INPUTS.numpy(), LABELS.numpy()), 8, cross_entropy),
        ({"x": INPUTS, "y": LABELS}, 8, dict_loss),
        (Pairs(), 8, cross_entropy),
        (DataLoader(Pairs(), batch_size=8, shuffle=True), None, cross_entropy),
        (DataLoader(TensorDataset(INPUTS, LABELS), batch_size=8), None, cross_entropy),
        (list(in_batches()), None, cross_entropy),
        (in_batches, None, cross_entropy),
        ([{"x": x, "y": y} for x, y in in_batches()], None, dict_loss),
        (table(), 8, dict_loss),
    ],
    ids=["tensors", "arrays", "dict", "dataset", "loader", "tensor dataset", "list", "function", "dicts", "table"],
)
def test_data_of_every_form_is_trained_on(data: Any, batch_size: int | None, loss: Any) -> None:
    model = mlp()
    losses = Losses()
    result = fit(
        model,
        data,
        loss=loss,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.05),
        batch_size=batch_size,
        epochs=10,
        callbacks=[losses],
        **QUIET,
    )
    assert (result.outcome, result.steps, result.epochs) == ("finished", 30, 10)
    assert sum(losses.values[-3:]) < 0.7 * sum(losses.values[:3])


def test_validation_takes_every_form_of_data_too() -> None:
    expected = None
    for validation in ((INPUTS, LABELS), Pairs(), DataLoader(Pairs(), batch_size=5), list(in_batches())):
        model = mlp()
        size = 8 if isinstance(validation, tuple | Pairs) else None
        result = fit(model, (INPUTS, LABELS) if size else list(in_batches()), loss=with_accuracy, batch_size=size,
                     optimizer=torch.optim.SGD(model.parameters(), lr=0.0), epochs=1, validation=validation,
                     **QUIET)  # fmt: skip
        expected = expected or result.evaluation
        assert result.evaluation == pytest.approx(expected, rel=1e-12)
    value, metrics = with_accuracy(mlp(), (INPUTS, LABELS))
    assert expected == pytest.approx({"loss": value.item(), "accuracy": metrics["accuracy"].item()}, rel=1e-12)


# -- losses and settings -------------------------------------------------------------------------------------------


def test_a_loss_may_bring_metrics_or_be_the_models_own() -> None:
    model = mlp()
    result = fit(model, (INPUTS, LABELS), loss=with_accuracy, optimizer=torch.optim.Adam(model.parameters(), lr=0.05),
                 batch_size=8, epochs=20, log_every=60, **QUIET)  # fmt: skip
    assert result.values.keys() == {"loss", "accuracy"}
    assert result.values["accuracy"] > 0.6

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"loss": F.cross_entropy(self.inner(x), y)}

    own = WithLoss()
    fit(own, (INPUTS, LABELS), loss=lambda m, b: m(*b)["loss"], optimizer=torch.optim.SGD(own.parameters(), lr=0.1),
        batch_size=8, steps=2, **QUIET)  # fmt: skip


@pytest.mark.parametrize("bad", [lambda m, b: m(b[0]), lambda m, b: 3.0, lambda m, b: (m(b[0]).sum(), 1)])
def test_a_loss_that_is_no_scalar_is_refused(bad: Any) -> None:
    model = mlp()
    with pytest.raises(TraceError, match="must return a scalar tensor"):
        fit(model, (INPUTS, LABELS), loss=bad, optimizer=torch.optim.SGD(model.parameters()), steps=1, **QUIET)


def test_accumulation_is_the_big_batch() -> None:
    small, big = mlp(), mlp()
    parts = [labelled(8, seed=n) for n in range(8)]
    wholes = [tuple(torch.cat(t) for t in zip(*parts[n : n + 4], strict=True)) for n in (0, 4)]
    for optimizer in (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, lr=0.01)):
        fit(small, parts, loss=cross_entropy, optimizer=optimizer(small.parameters()), epochs=1, accumulate=4, **QUIET)
        by_hand(big, optimizer(big.parameters()), wholes)
        for a, b in zip(small.parameters(), big.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    fit(small, parts, loss=cross_entropy, optimizer=millrace.optim.momentum(0.1), epochs=1, accumulate=4, **QUIET)
    by_hand(big, torch.optim.SGD(big.parameters(), lr=0.1, momentum=0.9), wholes)
    for a, b in zip(small.parameters(), big.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_a_schedule_scales_the_learning_rate() -> None:
    mine, twin = mlp(), mlp()
    batches = [labelled(8, seed=n) for n in range(6)]
    fit(mine, batches, loss=cross_entropy, optimizer=torch.optim.SGD(mine.parameters(), lr=0.5), epochs=1,
        schedule=lambda step: 1.0 / (1.0 + step), **QUIET)  # fmt: skip
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.5)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for batch in batches:
        by_hand(twin, optimizer, [batch])
        decay.step()
    for a, b in zip(mine.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)  # the factor is a float32, since step is an int64


def test_one_word_gives_mixed_precision() -> None:
    model, twin = mlp(torch.float32), mlp(torch.float32)
    data = labelled(24, torch.float32)
    seen: list[torch.dtype] = []

    def loss(model: Any, batch: Any) -> Tensor:
        logits = model(batch[0])
        seen.append(logits.dtype)
        return F.cross_entropy(logits, batch[1])

    losses = Losses()
    fit(model, data, loss=loss, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), batch_size=24, steps=5,
        precision="bfloat16", callbacks=[losses], **QUIET)  # fmt: skip
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected = by_hand(twin, torch.optim.SGD(twin.parameters(), lr=0.1), [data] * 5)
    assert losses.values == pytest.approx(expected, rel=0.05)
    assert losses.values != expected


@pytest.mark.parametrize("count", [3, 4])
def test_steps_in_one_call_change_no_bit(count: int) -> None:
    batches = [labelled(8, seed=n) for n in range(7)] + [labelled(5, seed=8)]
    ended = []
    for steps_per_call in (1, count):
        model = mlp()
        losses, evaluations = Losses(), Evaluations()
        fit(model, batches, loss=cross_entropy, optimizer=torch.optim.AdamW(model.parameters()), epochs=2,
            steps_per_call=steps_per_call, validation=batches[:2], evaluate_every=5, callbacks=[losses, evaluations],
            **QUIET)  # fmt: skip
        ended.append(([p.tolist() for p in model.parameters()], losses.values, evaluations.seen))
    assert ended[0] == ended[1]


class Evaluations(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_evaluate(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
        self.seen.append((step, float(values["loss"])))


def test_the_seed_decides_order_and_masks_and_nothing_else_does() -> None:
    def trained(seed: int) -> list[Any]:
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
        torch.rand(seed * 3 + 1)  # whatever else the program draws
        fit(model, (INPUTS, LABELS), loss=cross_entropy, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            batch_size=8, epochs=2, seed=seed % 2, **QUIET)  # fmt: skip
        return [p.tolist() for p in model.parameters()]

    assert trained(0) == trained(2)
    assert trained(0) != trained(1)


def test_fit_can_be_called_again_on_the_same_module() -> None:
    once, twice = mlp(), mlp()
    batches = [labelled(8, seed=n) for n in range(4)]
    for model, epochs in ((once, [2]), (twice, [1, 1])):
        for count in epochs:
            fit(model, batches, loss=cross_entropy, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
                epochs=count, **QUIET)  # fmt: skip
    for a, b in zip(once.parameters(), twice.parameters(), strict=True):
        assert a.equal(b)


# -- when things happen -----------------------------------------------------------------------------------------------


class Diary(Callback):
    def __init__(self, stop_at: int | None = None) -> None:
        self.lines: list[str] = []
        self._stop_at = stop_at

    def on_start(self, run: RunView) -> None:
        self.lines.append(f"start {run.step}")

    def on_step(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
        assert run.step == step
        self.lines.append(f"step {step}")
        if step == self._stop_at:
            run.stop()

    def on_evaluate(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
        self.lines.append(f"evaluate {step}")

    def on_checkpoint(self, run: RunView, step: int, path: Path) -> None:
        assert (path / "manifest.json").exists()
        self.lines.append(f"checkpoint {step}")

    def on_end(self, run: RunView, outcome: str) -> None:
        self.lines.append(f"end {outcome}")

    def about(self, word: str) -> list[str]:
        return [line for line in self.lines if line.startswith(word)]


@pytest.mark.parametrize("data", [list(in_batches()), in_batches], ids=["known length", "unknown length"])
def test_every_epoch_ends_with_an_evaluation_and_a_checkpoint(data: Any, in_tmp: Path) -> None:
    model, diary = mlp(), Diary()
    fit(model, data, loss=cross_entropy, optimizer=torch.optim.SGD(model.parameters()), epochs=3, validation=data,
        callbacks=[diary], **{**QUIET, "run_dir": "here"})  # fmt: skip
    assert diary.about("evaluate") == ["evaluate 3", "evaluate 6", "evaluate 9"]
    assert diary.about("checkpoint") == ["checkpoint 0", "checkpoint 3", "checkpoint 6", "checkpoint 9"]
    assert diary.lines[0] == "start 0"
    assert diary.lines[-1] == "end finished"
    assert diary.about("step") == [f"step {n}" for n in range(1, 10)]


def test_intervals_are_kept_and_the_end_is_never_left_out(in_tmp: Path) -> None:
    model, diary = mlp(), Diary()
    fit(model, in_batches, loss=cross_entropy, optimizer=torch.optim.SGD(model.parameters()), steps=8,
        validation=in_batches, evaluate_every=3, checkpoint_every=4, callbacks=[diary],
        **{**QUIET, "run_dir": "here"})  # fmt: skip
    assert diary.about("evaluate") == ["evaluate 3", "evaluate 6", "evaluate 8"]
    assert diary.about("checkpoint")[:3] == ["checkpoint 0", "checkpoint 4", "checkpoint 8"]


def test_a_callback_can_end_the_run(in_tmp: Path) -> None:
    model, diary = mlp(), Diary(stop_at=5)
    result = fit(model, in_batches, loss=cross_entropy, optimizer=torch.optim.SGD(model.parameters()), epochs=9,
                 callbacks=[diary], **{**QUIET, "run_dir": "here"})  # fmt: skip
    assert (result.outcome, result.steps) == ("finished", 5)
    assert diary.about("checkpoint")[-1] == "checkpoint 5"


def test_an_error_in_a_callback_ends_the_run_as_failed(in_tmp: Path) -> None:
    class Broken(Callback):
        def on_step(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
            raise ZeroDivisionError("mine")

    model, diary = mlp(), Diary()
    with pytest.raises(ZeroDivisionError) as caught:
        fit(model, in_batches, loss=cross_entropy, optimizer=torch.optim.SGD(model.parameters()), steps=3,
            callbacks=[Broken(), diary], **{**QUIET, "run_dir": "here"})  # fmt: skip
    assert "on_step of callback" in caught.value.__notes__[0]
    assert diary.lines[-1] == "end failed"
    assert RunDirectory.open(in_tmp / "here").state.status == "failed"


def test_early_stopping_ends_the_run_when_validation_gets_no_better() -> None:
    model = mlp()
    held_out = [(INPUTS, (LABELS + 1) % 3)]  # what is learned makes this worse
    evaluations = Evaluations()
    result = fit(model, in_batches, loss=cross_entropy, optimizer=torch.optim.Adam(model.parameters(), lr=0.1),
                 epochs=50, validation=held_out, early_stopping=EarlyStopping(patience=3), callbacks=[evaluations],
                 **QUIET)  # fmt: skip
    assert result.outcome == "finished"
    assert result.epochs < 50
    values = [value for _, value in evaluations.seen]
    assert min(values[-3:]) >= min(values[:-3])
    assert values[-4] == min(values)


# -- what is left behind -------------------------------------------------------------------------------------------


def test_the_run_directory_tells_what_was_asked_where_and_how_it_went(in_tmp: Path) -> None:
    model = mlp()
    result = fit(model, (INPUTS, LABELS), loss=with_accuracy, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
                 batch_size=8, epochs=4, validation=(INPUTS, LABELS), log_every=2, config={"task": "toy"},
                 compile="eager", progress=False)  # fmt: skip
    assert result.run_dir is not None
    assert result.run_dir.parent.name == "runs"
    assert result.run_dir.name.startswith("toy-")
    run = RunDirectory.open(result.run_dir)
    assert run.config["task"] == "toy"
    assert run.config["fit"]["epochs"] == 4
    assert run.config["fit"]["seed"] == 0
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["torch"] == torch.__version__ or torch.__version__ in json.dumps(environment)
    assert (run.state.status, run.state.step) == ("finished", 12)
    records = run.read_metrics()
    training = [r for r in records if "loss" in r]
    validation = [r for r in records if "validation/loss" in r]
    assert [r["step"] for r in training] == [2, 4, 6, 8, 10, 12]
    assert [r["step"] for r in validation] == [3, 6, 9, 12]
    assert set(training[0]) == {"step", "time_s", "loss", "accuracy"}
    assert validation[-1]["validation/accuracy"] == pytest.approx(result.evaluation["accuracy"])
    kept = sorted(path.name for path in run.checkpoints.iterdir())
    assert kept[-3:] == ["step-00000006", "step-00000009", "step-00000012"]
    stored = load_file(run.checkpoints / "step-00000012" / "variables.safetensors")
    for name, tensor in model.state_dict().items():
        assert stored[name].equal(tensor)


def test_short_runs_are_logged_as_well(in_tmp: Path) -> None:
    model = mlp()
    result = fit(model, in_batches, loss=cross_entropy, optimizer=torch.optim.SGD(model.parameters()), steps=2,
                 **{**QUIET, "run_dir": "here"})  # fmt: skip
    assert [r["step"] for r in RunDirectory.open(in_tmp / "here").read_metrics()] == [2]
    assert result.values["loss"] > 0


def test_the_best_checkpoint_is_kept(in_tmp: Path) -> None:
    model = mlp()
    held_out = [(INPUTS, (LABELS + 1) % 3)]
    fit(model, in_batches, loss=cross_entropy, optimizer=torch.optim.Adam(model.parameters(), lr=0.1), epochs=8,
        validation=held_out, keep_last=1, keep_best=1, **{**QUIET, "run_dir": "here"})  # fmt: skip
    run = RunDirectory.open(in_tmp / "here")
    scores = {r["step"]: r["validation/loss"] for r in run.read_metrics() if "validation/loss" in r}
    best = min(scores, key=lambda step: scores[step])
    kept = sorted(int(path.name.removeprefix("step-")) for path in run.checkpoints.iterdir())
    assert kept == sorted({best, 24})


def test_tensorboard_reads_the_scalars_and_the_graph(in_tmp: Path) -> None:
    model = mlp()
    fit(model, (INPUTS, LABELS), loss=with_accuracy, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        batch_size=8, epochs=2, validation=(INPUTS, LABELS), log_every=3,
        **{**QUIET, "run_dir": "here"})  # fmt: skip
    events = EventAccumulator(str(in_tmp / "here" / "events"))
    events.Reload()
    assert {"train/loss", "train/accuracy", "validation/loss", "validation/accuracy"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [3, 6]
    nodes = {node.name for node in events.Graph().node}
    assert any("tanh" in name for name in nodes)
    assert len(nodes) > 30


def test_nothing_is_written_when_nothing_is_wanted(in_tmp: Path) -> None:
    model = mlp()
    result = fit(model, in_batches, loss=cross_entropy, optimizer=torch.optim.SGD(model.parameters()), steps=2, **QUIET)
    assert result.run_dir is None
    assert list(in_tmp.iterdir()) == []


def test_progress_shows_loss_rate_and_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    model = mlp()
    fit(model, (INPUTS, LABELS), loss=with_accuracy, optimizer=torch.optim.SGD(model.parameters()), batch_size=8,
        epochs=2, validation=(INPUTS, LABELS), **{**QUIET, "progress": True})  # fmt: skip
    shown = capsys.readouterr()
    assert shown.out == ""
    for word in ("step 6/6", "epoch 2/2", "loss", "steps/s", "accuracy", "validation"):
        assert word in shown.err


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "steps=… or epochs=…"),
        ({"step": 3}, r"no setting 'step'. Did you mean 'steps'"),
        ({"steps": 0}, "steps=0: expected a whole number of at least 1"),
        ({"steps": 2.5}, "whole number"),
        ({"steps": True}, "whole number"),
        ({"steps": 1, "compile": "inducter"}, "'inductor'"),
        ({"steps": 1, "precision": "bf16"}, "float32, bfloat16"),
        ({"steps": 1, "resume": True}, "pass run_dir="),
        ({"steps": 1, "schedule": lambda s: 1.0, "optimizer": millrace.optim.sgd(0.1)}, "schedule is for torch.optim"),
        ({"steps": 1, "early_stopping": EarlyStopping()}, "validation"),
        ({"steps": 1, "early_stopping": 3}, r"expected an EarlyStopping, such as"),
        ({"steps": 1, "keep_last": 0}, "keep_last=0: expected a whole number of at least 1"),
        ({"steps": 1, "keep_best": -1}, "keep_best=-1: expected a whole number of at least 0"),
        ({"steps": 1, "seed": None}, "seed=None: expected a whole number"),
        ({"steps": 1, "seed": 1.5}, r"seed=1\.5"),
        ({"steps": 1, "run_dir": None}, "run_dir=None: expected a path, True"),
        ({"steps": 1, "schedule": 0.1}, r"schedule=0\.1: expected a function"),
        ({"steps": 1, "device": "cuda:99"}, "device='cuda:99': the model cannot be moved there"),
    ],
)
def test_settings_are_checked_before_anything_is_done(settings: dict[str, Any], message: str, in_tmp: Path) -> None:
    model = mlp()
    optimizer = settings.pop("optimizer", None) or torch.optim.SGD(model.parameters())
    with pytest.raises(SettingError, match=message):
        fit(model, in_batches, loss=cross_entropy, optimizer=optimizer, **settings)
    assert list(in_tmp.iterdir()) == []


def test_a_name_that_evaluation_does_not_give_is_told_at_the_first_evaluation() -> None:
    model = mlp()
    with pytest.raises(SettingError, match=r"watches 'acuracy'.*'accuracy'"):
        fit(model, in_batches, loss=with_accuracy, optimizer=torch.optim.SGD(model.parameters()), epochs=2,
            validation=in_batches, early_stopping=EarlyStopping("acuracy", mode="max"), **QUIET)  # fmt: skip


def test_training_goes_on_in_the_modules_own_memory() -> None:
    model = mlp()
    addresses = [p.data_ptr() for p in model.parameters()]
    fit(model, in_batches, loss=cross_entropy, optimizer=torch.optim.AdamW(model.parameters()), epochs=1, **QUIET)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    graph = millrace.training_graph(model, cross_entropy, torch.optim.SGD(model.parameters()), next(in_batches()))
    Session(graph, compile="eager").run("train", next(in_batches()))
    assert [p.data_ptr() for p in model.parameters()] == addresses
