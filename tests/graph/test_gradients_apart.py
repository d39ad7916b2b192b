"""The gradients of a convolution apart are the same gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from millrace.graph.check import check
from millrace.graph.graph import Graph
from millrace.graph.passes.gradients_apart import gradients_apart
from millrace.graph.training import training_graph
from millrace.runtime.session import Session

BACKWARD = torch.ops.aten.convolution_backward.default


def pictures(*, frozen: bool = False) -> tuple[Graph, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, bias=False),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, groups=2),
        nn.Flatten(),
        nn.LazyLinear(5),
    ).double()
    batch = torch.randn(4, 3, 8, 8).double(), torch.randint(0, 5, (4,))
    model(batch[0])
    if frozen:
        model[2].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return training_graph(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), optimizer, batch), batch


@pytest.mark.parametrize("frozen", [False, True])
def test_five_steps_give_the_same_bits(frozen: bool) -> None:
    graph, batch = pictures(frozen=frozen)
    apart = check(gradients_apart(graph))
    sessions = [Session(g, graph.initial, compile="eager", copy=True) for g in (graph, apart)]
    for _ in range(5):
        first, second = (session.run(["train", "loss"], batch)[1] for session in sessions)
        assert first.equal(second)
    for name, value in sessions[0].variables.items():
        assert value.equal(sessions[1].variables[name]), name


def test_each_makes_one_kind_of_gradient() -> None:
    graph, _ = pictures()
    masks = [list(node.args[-1]) for node in gradients_apart(graph).nodes if node.target is BACKWARD]
    assert sorted(masks) == [[False, True, False], *[[False, True, True]] * 2, *[[True, False, False]] * 2]


def test_a_graph_without_convolutions_is_itself() -> None:
    model = nn.Linear(3, 2)
    batch = torch.randn(4, 3), torch.randint(0, 2, (4,))
    graph = training_graph(
        model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), torch.optim.SGD(model.parameters(), lr=0.1), batch
    )
    assert gradients_apart(graph) is graph
