"""`fit` over parameter servers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import millrace
from millrace.errors import SettingError
from millrace.replicas.settings import Async, Hybrid
from millrace.train.fit import fit
from millrace.train.plan import Plan
from millrace.train.run_directory import RunDirectory


def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def test_asynchronous_replicas_train_a_model_and_say_how_stale_they_were(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
    x = torch.randn(240, 6)
    y = (x[:, 0] + x[:, 1] > 0).long()

    settings = {
        "loss": loss,
        "optimizer": millrace.optim.adagrad(0.1),
        "batch_size": 8,
        "validation": (x, y),
        "replicas": 2,
        "update": Async(copies=False),
        "spares": 0,
        "compile": "eager",
        "progress": False,
        "run_dir": tmp_path / "run",
    }
    with torch.no_grad():
        before = float(loss(model, (x, y)))
    result = fit(model, (x, y), epochs=6, **settings)
    assert result.steps == 180
    assert result.evaluation["loss"] < 0.5 * before
    with torch.no_grad():
        assert float(loss(model, (x, y))) == pytest.approx(result.evaluation["loss"], rel=1e-5)
    told = json.loads((tmp_path / "run" / "staleness.json").read_text())
    assert sum(told["updates_by_staleness"].values()) == 180
    assert told["mean_staleness"] == result.mean_staleness
    assert result.repeats == 0
    lines = RunDirectory.open(tmp_path / "run").read_metrics()
    assert any("staleness" in line for line in lines)
    assert fit(model, (x, y), epochs=7, resume=True, **settings).steps == 210


def test_embeddings_on_servers_are_trained_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    words = torch.randint(300, (400, 3))
    labels = (words.sum(1) % 7 < 3).long()
    model = nn.Sequential(nn.EmbeddingBag(300, 8), nn.Linear(8, 2))

    settings = {
        "loss": loss,
        "batch_size": 10,
        "validation": (words, labels),
        "replicas": 2,
        "update": Async(copies=False, parameter_servers=2),
        "spares": 0,
        "compile": "eager",
    }
    with torch.no_grad():
        before = float(loss(model, (words, labels)))
    run_dir = tmp_path / "run"
    given = {"epochs": 4, "optimizer": millrace.optim.adagrad(0.3), "run_dir": run_dir, **settings}
    result = fit(model, (words, labels), **given)
    assert result.evaluation["loss"] < 0.9 * before
    with torch.no_grad():
        assert float(loss(model, (words, labels))) == pytest.approx(result.evaluation["loss"], rel=1e-5)
    assert "travels whole" not in capsys.readouterr().err
    fresh = nn.Sequential(nn.EmbeddingBag(300, 8), nn.Linear(8, 2))
    resumed = fit(fresh, (words, labels), resume=True, **given)
    assert resumed.steps == result.steps
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in fresh.state_dict().items())
    fit(model, (words, labels), epochs=1, optimizer=millrace.optim.momentum(0.01), **settings)
    assert "the table '0.weight' travels whole in every step: the optimizer changes it" in capsys.readouterr().err


def test_more_servers_than_variables_are_refused() -> None:
    settings = {"epochs": 1, "optimizer": millrace.optim.sgd(0.1), "batch_size": 4, "replicas": 2, "compile": "eager"}
    data = (torch.ones(8, 3), torch.zeros(8).long())
    says = r"parameter_servers=3: the model has 2 trained tensors.*at most 2"
    with pytest.raises(SettingError, match=says):
        fit(nn.Linear(3, 2), data, loss=loss, update=Async(parameter_servers=3), **settings)


def test_groups_of_replicas_train_a_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
    x = torch.randn(240, 6)
    y = (x[:, 0] + x[:, 1] > 0).long()

    with torch.no_grad():
        before = float(loss(model, (x, y)))
    result = fit(
        model,
        (x, y),
        loss=loss,
        optimizer=millrace.optim.adagrad(0.1),
        epochs=4,
        batch_size=8,
        validation=(x, y),
        update=Hybrid(groups=2, replicas=2, copies=False),
        spares=0,
        compile="eager",
        progress=False,
        run_dir=tmp_path / "run",
    )
    assert result.steps == 120
    assert result.evaluation["loss"] < 0.5 * before
    told = json.loads((tmp_path / "run" / "staleness.json").read_text())
    assert sum(told["updates_by_staleness"].values()) == 120


def test_the_size_of_a_group_is_said_once() -> None:
    with pytest.raises(SettingError, match=r"replicas=3 and update=Hybrid\(replicas=2\)"):
        Plan(steps=1, replicas=3, update=Hybrid(replicas=2))
    assert Plan(steps=1, update=Hybrid(groups=3, replicas=2)).workers == 6
    assert Plan(steps=1, replicas=4, update="hybrid").workers == 8
