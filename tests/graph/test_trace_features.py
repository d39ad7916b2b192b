"""Optimizers, control flow, own operators and labels of traced steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .against_eager import match_eager, training

# Optimizers.


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def classify(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(dtype: torch.dtype = torch.float64) -> list[Any]:
    return [(torch.randn(16, 8, dtype=dtype), torch.randint(0, 4, (16,))) for _ in range(3)]


OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 1e-2}),
    ("SGD", {"lr": 1e-2, "momentum": 0.9}),
    ("SGD", {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("SGD", {"lr": 1e-2, "maximize": True}),
    ("Adam", {"lr": 1e-2}),
    ("Adam", {"lr": 1e-2, "amsgrad": True, "weight_decay": 0.1}),
    ("AdamW", {"lr": 1e-2, "amsgrad": True, "maximize": True}),
    ("Adagrad", {"lr": 1e-2, "lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    ("RMSprop", {"lr": 1e-2}),
    ("RMSprop", {"lr": 1e-2, "centered": True, "momentum": 0.9, "weight_decay": 0.1}),
    ("NAdam", {"lr": 1e-2, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    ("RAdam", {"lr": 1e-2}),
    ("Adamax", {"lr": 1e-2, "weight_decay": 0.1}),
    ("Adadelta", {"lr": 1.0}),
    ("ASGD", {"lr": 1e-2, "t0": 2}),
    ("Rprop", {"lr": 1e-2}),
    ("Adam", {"lr": torch.tensor(1e-2, dtype=torch.float64)}),
    ("SGD", {"lr": torch.tensor(1e-2, dtype=torch.float64), "momentum": 0.9}),
]


def _named(case: Any) -> str:
    return case if isinstance(case, str) else ",".join(case)


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "continued"])
@pytest.mark.parametrize(("name", "settings"), OPTIMIZERS, ids=_named)
def test_optimizer(name: str, settings: dict[str, Any], warm: bool) -> None:
    data = batches()
    make, step = training(mlp, classify, lambda m: getattr(torch.optim, name)(m.parameters(), **settings))

    def build() -> dict[str, Any]:
        given = make()
        for _ in range(7 if warm else 0):  # RAdam takes another branch from its sixth step on
            step(given, data[0])
        return given

    match_eager(build, step, data, steps=8 if name == "RAdam" else 5)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))

    make, step = training(model, classify, lambda m: torch.optim.Muon(m.parameters(), lr=1e-2))
    match_eager(make, step, batches())
