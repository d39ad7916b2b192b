"""What Inductor is given: ATen alone, constants as inputs, updates as assignments, and still the same step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from tests.compile.steps import BATCH, fresh, step_graph
from tests.graph.programs import Program, programs
from torch import Tensor, nn

from millrace.compile.eager import compile_eager
from millrace.compile.lower import lowered
from millrace.compile.tiered import Runner
from millrace.graph.graph import Graph
from millrace.graph.trace import trace
from millrace.graph.training import training_graph


def run_lowered(graph: Graph, variables: list[Tensor], feeds: list[Tensor]) -> list[Tensor]:
    module, constants = lowered(graph)
    with torch.no_grad():
        return list(module(*variables, *feeds, *constants))


def agree(graph: Graph, variables: list[Tensor], feeds: list[Tensor]) -> bool:
    twins = [v.clone() for v in variables]
    for _ in range(2):
        found, expected = run_lowered(graph, variables, feeds), compile_eager(graph)(twins, feeds)
        if not all(torch.equal(a, b) for a, b in zip([*found, *variables], [*expected, *twins], strict=True)):
            return False
    return True


def test_randomness_is_inlined_bit_for_bit() -> None:
    graph = step_graph()
    before = {str(node.target) for node in graph.nodes}
    after = {str(node.target) for node in lowered(graph)[0].graph.nodes if node.op == "call_function"}
    assert "millrace.uniform.default" in before
    assert not [target for target in after if target.startswith("millrace.")]
    assert agree(graph, fresh(graph), list(BATCH))


@given(program=programs)
@settings(max_examples=25, deadline=None)
def test_random_programs_stay_the_same(program: Program) -> None:
    graph = program.graph()
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    assert agree(graph, tensors[:2], tensors[2:])


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("shape", [(300,), (4, 25), (0,)])
def test_gradients_of_lookups_are_summed_in_order(padding: int | None, shape: tuple[int, ...]) -> None:
    """Each row's are, as PyTorch does: to the bit. Where padding is left out, its own operator stays."""
    torch.manual_seed(0)
    table, index = nn.Embedding(7, 3, padding_idx=padding, dtype=torch.float64), torch.randint(7, shape)
    scale = torch.randn(*shape, 3, dtype=torch.float64)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) * batch[1]).sum()

    graph = training_graph(table, loss, torch.optim.SGD(table.parameters(), lr=0.1), (index, scale))
    targets = {node.target for node in lowered(graph)[0].graph.nodes}
    assert (torch.ops.aten.embedding_dense_backward.default in targets) == (padding is not None)
    assert agree(graph, [table.weight.detach().clone(), *(v.clone() for v in fresh(graph)[1:])], [index, scale])


def test_constants_follow_the_feeds_in_order() -> None:
    def step(v: dict[str, Any], x: Tensor) -> Tensor:
        v["w"] = v["w"] + torch.tensor([1.0, 2.0]) * x
        return (v["w"] - torch.tensor([10.0, 20.0])).sum()

    graph = trace(step, {"w": torch.zeros(2)}, torch.ones(2))
    module, constants = lowered(graph)
    assert not module.graph.find_nodes(op="get_attr")
    assert len(module.graph.find_nodes(op="placeholder")) == 2 + len(constants)
    assert agree(graph, [torch.zeros(2)], [torch.ones(2)])


def test_a_graph_that_only_copies_a_constant() -> None:
    def step(v: dict[str, Any], x: Tensor) -> Tensor:
        v["w"] = torch.tensor([3.0, 4.0])
        return x.sum()

    graph = trace(step, {"w": torch.zeros(2)}, torch.ones(2))
    assert agree(graph, [torch.zeros(2)], [torch.ones(2)])


def test_powers_of_a_count_are_worked_out_once() -> None:
    def step(v: dict[str, Any], x: Tensor) -> Tensor:
        v["n"] = v["n"] + 1
        v["m"] = v["m"] + 1
        return torch.stack([0.999 ** v["n"], 2.0 ** v["n"], (0.9 ** v["m"]).double()]) + x.sum()

    start = {"n": torch.tensor(1000.0, dtype=torch.float64), "m": torch.tensor(7)}
    graph = trace(step, start, torch.zeros(1, dtype=torch.float64))
    module, _ = lowered(graph)
    powers = [n for n in module.graph.nodes if n.target is torch.ops.aten.pow.Scalar]
    assert len(powers) <= 1  # of the whole number
    feeds = [torch.zeros(1, dtype=torch.float64)]
    expected = torch.tensor([0.999**1001, 2.0**1001, 0.9**8], dtype=torch.float64)
    (found,) = run_lowered(graph, [t.clone() for t in start.values()], feeds)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-12, atol=0)


@pytest.mark.long
def test_a_factor_of_a_sum_survives_the_compiler() -> None:
    """Weight decay of `torch.optim.SGD` is such a factor, and its sum follows a matrix product."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    graph = training_graph(model, lambda m, x: m(x).square().mean(), sgd, torch.randn(8, 16))
    assert any("alpha" in node.kwargs for node in graph.nodes)
    said: list[str] = []
    runner = Runner(graph, "inductor", said.append)
    runner(fresh(graph), [torch.randn(8, 16)])
    assert runner.tier == "inductor", said
