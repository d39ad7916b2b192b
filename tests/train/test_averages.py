"""`fit` with an optimizer that keeps averages: they are evaluated, saved, and left in the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.small import cross_entropy, differing, labelled
from torch import Tensor, nn

from millrace import Checkpoints, fit
from millrace.graph.passes.splitting.split import joined
from millrace.optim import Optimizer, adamw, averages_in
from millrace.train.result import Result

RULE = adamw(0.05)
AVERAGED = replace(RULE, average=0.9)
WAYS: dict[str, dict[str, Any]] = {
    "one process": {},
    "two blocks": {"partitions": 2},
    "two replicas": {"replicas": 2},
    "servers": {"replicas": 2, "update": "async"},
    "two devices": {"devices": 2, "microbatches": 2},
}


def net() -> nn.Sequential:
    """Wide enough for its first layer to be divided."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 3))


def trained(directory: Path, optimizer: Optimizer, **changes: Any) -> tuple[nn.Module, Result]:
    model = net()
    held_out = labelled(12, torch.float32, seed=2)
    options = {"steps": 12, "batch_size": 8, "evaluate_every": 5, "compile": "eager", "progress": False} | changes
    result = fit(
        model,
        labelled(24, torch.float32),
        validation=held_out,
        loss=cross_entropy,
        optimizer=optimizer,
        run_dir=directory,
        **options,
    )
    model.eval()
    with torch.no_grad():
        assert float(cross_entropy(model, held_out)) == pytest.approx(result.evaluation["loss"], rel=1e-5)
    return model, result


def saved(directory: Path) -> dict[str, Tensor]:
    return joined(Checkpoints(directory / "checkpoints").load().tensors)


@pytest.mark.parametrize("way", [pytest.param(w, marks=[pytest.mark.long] if w == "two devices" else []) for w in WAYS])
def test_the_averages_are_what_is_evaluated_and_what_the_model_holds_in_the_end(way: str, tmp_path: Path) -> None:
    model, _ = trained(tmp_path / "run", AVERAGED, **WAYS[way])
    variables = saved(tmp_path / "run")
    averages = averages_in(variables)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == averages.keys()
    assert differing({n: p.detach() for n, p in parameters.items()}, averages) == []
    assert set(differing({n: variables[n] for n in averages}, averages)) == averages.keys()


def test_averages_change_nothing_in_training(tmp_path: Path) -> None:
    trained(tmp_path / "with", AVERAGED)
    trained(tmp_path / "without", RULE)
    plain, averaged = saved(tmp_path / "without"), saved(tmp_path / "with")
    assert differing(plain, {name: averaged[name] for name in plain}) == []


def test_a_resumed_run_has_the_same_averages(tmp_path: Path) -> None:
    expected, _ = trained(tmp_path / "whole", AVERAGED)
    trained(tmp_path / "parts", AVERAGED, steps=7)
    resumed, _ = trained(tmp_path / "parts", AVERAGED, resume=True)
    assert differing(expected.state_dict(), resumed.state_dict()) == []
    assert differing(saved(tmp_path / "whole"), saved(tmp_path / "parts")) == []
