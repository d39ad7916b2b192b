"""Captured steps: on a GPU the replayed graph equals single steps; anywhere, the loop before the capture does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millrace.compile.cuda_graph import CapturedSteps
from millrace.compile.tiered import Runner
from millrace.graph.graph import Graph
from millrace.graph.passes.prune import prune
from millrace.graph.training import training_graph
from millrace.runtime.session import Session


def _loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _graph(device: str) -> tuple[Graph, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)).to(device)
    batches = [(torch.randn(6, 4, device=device), torch.randint(0, 3, (6,), device=device)) for _ in range(4)]
    whole = training_graph(model, _loss, torch.optim.AdamW(model.parameters()), batches[0])
    return prune(whole, ["loss"], whole.updates), batches


def test_until_it_is_compiled_steps_run_one_by_one() -> None:
    graph, batches = _graph("cpu")
    said: list[str] = []
    apart = [t.detach().clone() for t in graph.initial.values()]
    together = [t.clone() for t in apart]
    single = Runner(graph, "eager", said.append)
    losses = torch.stack([single(apart, list(batch))[0] for batch in batches])
    steps = CapturedSteps(Runner(graph, "eager", said.append), 4, said.append)
    assert torch.equal(steps(together, [feed for batch in batches for feed in batch])[0], losses)
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))
    assert steps.tier == "eager"


@pytest.mark.gpu
def test_replayed_steps_equal_single_ones() -> None:
    graph, batches = _graph("cuda")
    said: list[str] = []
    single = Session(graph, compile="inductor", copy=True, say=said.append)
    many = Session(graph, compile="inductor", copy=True, say=said.append)
    for _ in range(3):
        expected = torch.stack([single.run(["train", "loss"], batch)[1] for batch in batches])
        torch.testing.assert_close(many.run_steps(["train", "loss"], batches)[1], expected)
    assert not any("no CUDA graph" in line for line in said), said
    for name in single.variables:
        torch.testing.assert_close(many.read(name), single.read(name))
