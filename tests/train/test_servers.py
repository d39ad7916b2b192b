"""`fit` over parameter servers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import millrace
from millrace.replicas.settings import Async
from millrace.train.fit import fit
from millrace.train.run_directory import RunDirectory


def test_asynchronous_replicas_train_a_model_and_say_how_stale_they_were(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
    x = torch.randn(240, 6)
    y = (x[:, 0] + x[:, 1] > 0).long()

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(net(batch[0]), batch[1])

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
