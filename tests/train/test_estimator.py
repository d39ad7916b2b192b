"""The estimator's shape: train, evaluate, predict and export on one object, which shares the module's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.small import dropout_mlp, labelled, mlp, with_accuracy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import millrace
from millrace import Estimator
from millrace.errors import CheckpointError, DataError, RunDirectoryError, SettingError

INPUTS, LABELS = labelled(60)
QUIET: dict[str, Any] = {"compile": "eager", "progress": False, "run_dir": False}


def estimator(model: nn.Module | None = None, **settings: Any) -> Estimator:
    model = model or dropout_mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    return Estimator(model, loss=with_accuracy, optimizer=optimizer, **{**QUIET, **settings})


def in_plain_torch(model: nn.Module, inputs: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        result = model(inputs)
    model.train()
    return result


def test_it_trains_evaluates_predicts_and_exports(tmp_path: Path) -> None:
    e = estimator()
    before = e.evaluate((INPUTS, LABELS))
    result = e.train((INPUTS, LABELS), batch_size=10, epochs=20)
    after = e.evaluate((INPUTS, LABELS))
    assert (result.outcome, result.steps) == ("finished", 120)
    assert after["loss"] < 0.6 * before["loss"]
    assert after["accuracy"] > 0.8

    logits = e.predict((INPUTS, LABELS), batch_size=7)
    torch.testing.assert_close(logits, in_plain_torch(e.model, INPUTS), rtol=0, atol=1e-12)
    assert after["accuracy"] == pytest.approx((logits.argmax(1) == LABELS).double().mean().item())

    e.export_weights(tmp_path / "weights.safetensors")
    plain = dropout_mlp(seed=9)
    plain.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    torch.testing.assert_close(in_plain_torch(plain, INPUTS), logits, rtol=0, atol=1e-12)


def test_it_is_fit_with_its_settings_and_those_of_the_call() -> None:
    e, model = estimator(mlp(), seed=3, batch_size=10), mlp()
    with pytest.raises(SettingError, match="no setting 'step'"):
        estimator(mlp()).train((INPUTS, LABELS), step=1)
    with pytest.raises(TypeError, match="batch_size"):  # belongs to the data, so it is train's own
        e.train((INPUTS, LABELS), batch_size=10, steps=1)
    e = estimator(mlp(), seed=3)
    e.train((INPUTS, LABELS), batch_size=10, epochs=2, seed=4)
    millrace.fit(model, (INPUTS, LABELS), loss=with_accuracy, optimizer=torch.optim.Adam(model.parameters(), lr=0.05),
                 batch_size=10, epochs=2, seed=4, **QUIET)  # fmt: skip
    for mine, other in zip(e.model.parameters(), model.parameters(), strict=True):
        assert mine.equal(other)


def test_evaluation_and_prediction_follow_every_training_and_change_nothing() -> None:
    e = estimator()
    for _ in range(2):
        e.train((INPUTS, LABELS), batch_size=10, steps=3)
        weights = [p.clone() for p in e.model.parameters()]
        torch.testing.assert_close(e.predict(INPUTS), in_plain_torch(e.model, INPUTS), rtol=0, atol=1e-12)
        value, metrics = with_accuracy(e.model.eval(), (INPUTS, LABELS))
        e.model.train()
        expected = {"loss": value.item(), "accuracy": metrics["accuracy"].item()}
        assert e.evaluate((INPUTS, LABELS), batch_size=60) == pytest.approx(expected, rel=1e-12)
        assert all(a.equal(b) for a, b in zip(e.model.parameters(), weights, strict=True))
        assert all(module.training for module in e.model.modules())


@pytest.mark.parametrize("batch_size", [7, 20, 60])
def test_each_example_counts_once_whatever_the_batches(batch_size: int) -> None:
    e = estimator(mlp())
    assert e.evaluate((INPUTS, LABELS), batch_size=batch_size) == pytest.approx(e.evaluate((INPUTS, LABELS)))
    loader = DataLoader(TensorDataset(INPUTS, LABELS), batch_size=batch_size, shuffle=True, drop_last=True)
    assert e.evaluate(loader) == pytest.approx(e.evaluate((INPUTS, LABELS)))
    assert e.predict(loader).shape == (60, 3)


def test_a_prediction_may_be_a_nest_and_of_ones_own() -> None:
    model = mlp()
    e = Estimator(
        model,
        loss=with_accuracy,
        optimizer=millrace.optim.sgd(0.1),
        predict=lambda m, x: {"probability": m(x).softmax(1).amax(1), "label": m(x).argmax(1)},
        **QUIET,
    )
    found = e.predict(INPUTS, batch_size=25)
    expected = in_plain_torch(model, INPUTS).softmax(1)
    torch.testing.assert_close(found["probability"], expected.amax(1), rtol=0, atol=1e-12)
    assert found["label"].equal(expected.argmax(1))


def test_bad_use_is_explained(tmp_path: Path) -> None:
    e = estimator(run_dir=tmp_path / "run")
    with pytest.raises(DataError, match="is empty"):
        e.predict((INPUTS[:0], LABELS[:0]))
    with pytest.raises(DataError, match="same length"):
        e.evaluate((INPUTS, LABELS[:5]))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        e.export_weights(tmp_path / "file" / "weights.safetensors")
    e.train((INPUTS, LABELS), batch_size=10, steps=1)
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        e.train((INPUTS, LABELS), batch_size=10, steps=1)


@pytest.mark.gpu
def test_the_same_program_runs_on_cuda(tmp_path: Path) -> None:
    on = {}
    for device in ("cpu", "cuda"):
        e = estimator(mlp(), device=device)
        e.train((INPUTS, LABELS), batch_size=10, epochs=3)
        assert next(e.model.parameters()).device.type == device
        on[device] = e.predict((INPUTS, LABELS))
        assert on[device].device.type == "cpu"
        e.export_weights(tmp_path / f"{device}.safetensors")
    torch.testing.assert_close(on["cuda"], on["cpu"], rtol=0, atol=1e-9)
