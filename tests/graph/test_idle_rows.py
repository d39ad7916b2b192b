"""What is said of idle rows is what an optimizer does with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millrace import optim
from millrace.compile.eager import compile_eager
from millrace.graph.passes.halves import halves
from millrace.graph.passes.idle_rows import why_not_idle
from millrace.graph.training import training_graph

LEAVES = {
    "sgd": lambda m: optim.sgd(0.1),
    "decayed rate": lambda m: optim.sgd(optim.cosine(0.1, 10)),
    "adagrad": lambda m: optim.adagrad(0.1),
    "torch sgd": lambda m: torch.optim.SGD(m.parameters(), 0.1),
    "torch adagrad": lambda m: torch.optim.Adagrad(m.parameters(), 0.1, lr_decay=0.1),
}
CHANGES = {
    "weight decay": lambda m: optim.sgd(0.1, weight_decay=0.1),
    "momentum": lambda m: optim.momentum(0.1),
    "adam": lambda m: optim.adam(0.1),
    "rmsprop": lambda m: optim.rmsprop(0.1),
    "lion": lambda m: optim.lion(0.1),
    "torch momentum": lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9),
    "torch adamw": lambda m: torch.optim.AdamW(m.parameters(), 0.1),
}


@pytest.mark.parametrize("make", [*LEAVES.values(), *CHANGES.values()], ids=[*LEAVES, *CHANGES])
def test_rows_without_gradient_stay_exactly_where_it_is_said(make: Callable[[nn.Module], object]) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(6, 3).double()

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return F.mse_loss(model(batch), torch.ones(4, 3, dtype=torch.float64))

    update = halves(training_graph(table, loss, make(table), torch.arange(4), seed=0)).update
    said = why_not_idle(update, "weight")
    variables = {
        v.name: torch.rand(v.spec.shape, dtype=v.spec.dtype) + 0.5 if v.spec.shape else update.initial[v.name].clone()
        for v in update.variables
    }
    before = {name: value.clone() for name, value in variables.items() if value.ndim}
    gradient = torch.zeros(6, 3, dtype=torch.float64)
    gradient[:2] = 1.0
    compile_eager(update)(list(variables.values()), [gradient])
    stay = all(torch.equal(variables[name][2:], value[2:]) for name, value in before.items())
    assert stay == (not said), said
    assert not stay or not torch.equal(variables["weight"][:2], before["weight"][:2])


@pytest.mark.parametrize("make", CHANGES.values(), ids=CHANGES)
def test_the_line_that_changes_them_is_named(make: Callable[[nn.Module], object]) -> None:
    table = nn.Embedding(6, 3)
    graph = training_graph(table, lambda m, b: m(b).sum(), make(table), torch.arange(4), seed=0)
    assert "rows whose gradient is zero" in why_not_idle(halves(graph).update, "weight")
