"""Row updates of embeddings: the same numbers as the dense update, and only where nothing else needs the gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millrace import optim
from millrace.compile.eager import compile_eager
from millrace.graph.check import check
from millrace.graph.graph import Graph
from millrace.graph.passes.prune import prune
from millrace.graph.passes.sparse_rows import sparse_rows
from millrace.graph.training import training_graph

BATCH = (torch.tensor([[1, 2, 2], [0, 4, 1]]), torch.tensor([0, 1]))


def _model(padding: int | None = None, by_frequency: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    table = nn.Embedding(6, 4, padding_idx=padding, scale_grad_by_freq=by_frequency)
    return nn.Sequential(table, nn.Flatten(), nn.Linear(12, 2)).double()


def _loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _graph(model: nn.Module, optimizer: Any) -> Graph:
    whole = training_graph(model, _loss, optimizer, BATCH)
    return prune(whole, ["loss"], whole.updates)


def _operators(graph: Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes}


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("ours", [False, True])
def test_rows_equal_the_dense_update(padding: int | None, ours: bool) -> None:
    model = _model(padding)
    reference = copy.deepcopy(model)
    eager = torch.optim.SGD(reference.parameters(), lr=0.3)
    dense = _graph(model, optim.sgd(0.3) if ours else torch.optim.SGD(model.parameters(), lr=0.3))
    rows = check(sparse_rows(dense))
    assert "aten.index_put.default" in _operators(rows)
    assert "aten.embedding_dense_backward.default" not in _operators(rows)
    run = compile_eager(rows)
    for _ in range(5):
        (loss,) = run([t.detach() for t in rows.initial.values()], list(BATCH))
        expected = _loss(reference, BATCH)
        eager.zero_grad()
        expected.backward()
        eager.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(model[0].weight, reference[0].weight, rtol=1e-12, atol=1e-14)


def _clipped(model: nn.Module) -> Any:
    return optim.sgd(0.3, clip_norm=1.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9),
        lambda m: torch.optim.SGD(m.parameters(), lr=0.3, weight_decay=0.1),
        lambda m: torch.optim.AdamW(m.parameters()),
        _clipped,
    ],
    ids=["momentum", "weight decay", "adamw", "clipped"],
)
def test_a_gradient_with_other_uses_stays_dense(make: Any) -> None:
    model = _model()
    graph = _graph(model, make(model))
    assert sparse_rows(graph) is graph


def test_a_fetched_gradient_stays_dense() -> None:
    model = _model()
    whole = training_graph(model, _loss, torch.optim.SGD(model.parameters(), lr=0.3), BATCH)
    graph = prune(whole, ["gradient/0.weight"], whole.updates)
    assert sparse_rows(graph) is graph


def test_frequency_scaling_stays_dense() -> None:
    model = _model(by_frequency=True)
    graph = _graph(model, torch.optim.SGD(model.parameters(), lr=0.3))
    assert sparse_rows(graph) is graph
