"""Which gradients are added up early: the last layer's first, in stages of like bytes, the same for every worker."""

from __future__ import annotations

import pytest
import torch
from tests.graph.step_models import step_graph
from torch import nn

from millrace.graph.graph import Graph
from millrace.graph.passes.halves import Halves, halves
from millrace.graph.training import training_graph
from millrace.replicas import stages
from millrace.replicas.stages import STAGES, all_stages, early_stages


def deep() -> Halves:
    net = nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(300, 300), nn.Tanh())])
    batch = torch.randn(4, 300), torch.randn(4, 300)
    return halves(training_graph(net, _loss, torch.optim.SGD(net.parameters(), lr=0.1), batch))


def _loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def early_of(cut: Halves) -> stages.Stages:
    return early_stages(cut.gradients, [feed.name for feed in cut.exchanged])


def test_the_last_layers_come_first_and_something_is_left() -> None:
    cut = deep()
    names = [feed.name for feed in cut.exchanged]
    early = early_of(cut)
    assert 1 < len(early) < STAGES + 1
    layers = [int(name.split("/")[1].split(".")[0]) for stage in early for name in stage]
    assert layers == sorted(layers, reverse=True)
    whole = all_stages(early, [*names, "new/mean"])
    assert sorted(name for stage in whole for name in stage) == sorted([*names, "new/mean"])
    assert "gradient/0.weight" in whole[-1]
    sizes = [sum(feed.spec.size_bytes for feed in cut.exchanged if feed.name in stage) for stage in whole]
    assert max(sizes) <= 2 * min(sizes)


def test_a_small_step_is_added_up_at_once() -> None:
    cut = halves(step_graph("mlp", "sgd"))
    assert early_of(cut) == ()
    assert all_stages((), ["b", "a"]) == (("a", "b"),)


def test_integers_and_what_no_collective_adds_up_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "LEAST_BYTES", 1)
    cut = deep()
    half: Graph = cut.gradients.with_(fetches={**cut.gradients.fetches, "count": _integer(cut.gradients)})
    early = early_stages(half, [*(feed.name for feed in cut.exchanged), "count"])
    assert "count" not in [name for stage in early for name in stage]


def _integer(graph: Graph) -> str:
    fx = graph.fx
    with fx.inserting_before(next(iter(fx.find_nodes(op="output")))):
        node = fx.call_function(torch.ops.aten.zeros.default, ([2],), {"dtype": torch.int64})
        node.meta["val"] = torch.zeros(2, dtype=torch.int64, device="meta")
    return str(node.name)
