"""A batch in parts trains like the whole batch."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.graph.programs import run
from torch import Tensor, nn

import millrace
from millrace.compile.in_place import in_place
from millrace.errors import SettingError
from millrace.graph.check import check
from millrace.graph.flops import node_flops
from millrace.graph.graph import Graph
from millrace.graph.passes.microbatch import MICROBATCH, microbatch
from millrace.graph.trace import trace
from millrace.graph.training import training_graph
from millrace.place.grouping import group

SIZE = 12
aten = torch.ops.aten


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(SIZE, 6, generator=generator).double(), torch.randint(0, 4, (SIZE,), generator=generator)


def loss(model: nn.Module, batch: Any, reduction: str = "mean") -> Any:
    scores = model(batch[0])
    hits = (scores.argmax(-1) == batch[1]).sum()
    return F.cross_entropy(scores, batch[1], reduction=reduction), {"hits": hits, "scores": scores}


def graph_of(width: int, layers: int, optimizer: Any, reduction: str = "mean") -> Graph:
    torch.manual_seed(1)
    sizes = [6, *[width] * layers, 4]
    model = nn.Sequential(*(m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())))
    chosen = optimizer(model.parameters()) if callable(optimizer) else optimizer
    return training_graph(model.double(), lambda m, b: loss(m, b, reduction), chosen, batch())


def parts_of(count: int) -> list[Tensor]:
    return [part for pair in zip(*(t.chunk(count) for t in batch()), strict=True) for part in pair]


OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.AdamW(p, lr=0.01),
    millrace.optim.adam(0.01, clip_norm=0.1),
]


@settings(max_examples=12, deadline=None)
@given(
    width=st.integers(1, 9),
    layers=st.integers(0, 3),
    optimizer=st.sampled_from(OPTIMIZERS),
    count=st.sampled_from([2, 3, 4, 6]),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_training_in_parts_is_training_on_the_whole(
    width: int, layers: int, optimizer: Any, count: int, reduction: str
) -> None:
    graph = graph_of(width, layers, optimizer, reduction)
    divided = microbatch(graph, count, reduction=reduction)
    check(divided)
    expected = run(graph, graph.initial, list(batch()), steps=3)
    for got, wanted in zip(run(divided, graph.initial, parts_of(count), steps=3), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_the_product_that_is_a_gradient_is_added_to_the_sum_by_one_node() -> None:
    whole = graph_of(5, 2, OPTIMIZERS[1])
    divided = microbatch(whole, 3)
    before, after = (Counter(node.target for node in graph.nodes) for graph in (whole, divided))
    weights = 3
    assert after[aten.addmm.default] == 3 * before[aten.addmm.default] + 2 * weights
    assert after[aten.mm.default] == 3 * before[aten.mm.default] - 2 * weights
    # Each in the memory of the one before.
    written = Counter(node.target for node in in_place(divided).graph.nodes)
    assert written[aten.addmm_.default] == 2 * weights
    tasks = group(divided, lambda _: 1.0).tasks
    for part in range(3):
        gradients = [task for task in tasks if "gradients" in task.name and task.microbatch == part]
        products = [n for task in gradients for n in task.nodes if n.target in (aten.mm.default, aten.addmm.default)]
        assert len(products) == weights
        assert all(node_flops(node) > 0 and node.meta[MICROBATCH] == part for node in products)


def test_a_product_that_is_read_elsewhere_too_is_not_made_twice() -> None:
    def step(v: dict[str, Any], x: Tensor) -> dict[str, Tensor]:
        loss = (x @ v["w"]).square().mean()
        (gradient,) = torch.autograd.grad(loss, [v["w"]])
        size = gradient.square().sum()
        v["w"] = v["w"] - 0.1 * gradient
        return {"loss": loss, "size": size}

    graph = trace(step, {"w": torch.ones(3, 3, requires_grad=True)}, torch.randn(4, 3))
    divided = microbatch(graph, 2)
    before, after = (Counter(node.target for node in g.nodes) for g in (graph, divided))
    assert before[aten.mm.default] * 2 == after[aten.mm.default]
    assert not after[aten.addmm.default]
    check(divided)


def test_each_part_draws_its_own_random_numbers_and_passes_statistics_on() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5)).double()

    def mean(model: nn.Module, x: Tensor) -> Any:
        result = model(x)
        return result.mean(), {"kept": result != 0}

    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    graph = training_graph(model, mean, sgd, batch()[0])
    same = batch()[0][:4]
    fetched = run(microbatch(graph, 3), graph.initial, [same, same, same], steps=1)
    kept = fetched[list(graph.fetches).index("kept")]
    assert len({tuple(part.flatten().tolist()) for part in kept.chunk(3)}) == 3
    model.train()
    for _ in range(3):
        model(same)
    names = [v.name for v in graph.variables]
    torch.testing.assert_close(fetched[len(graph.fetches) + names.index("0.running_var")], model[0].running_var)


def test_one_part_is_the_graph_itself() -> None:
    graph = graph_of(3, 1, OPTIMIZERS[0])
    assert microbatch(graph, 1) is graph


def test_what_cannot_be_divided_is_refused() -> None:
    graph = graph_of(3, 1, OPTIMIZERS[0])
    with pytest.raises(SettingError, match="does not divide a batch of 12"):
        microbatch(graph, 5)
    with pytest.raises(SettingError, match="'mean' or 'sum'"):
        microbatch(graph, 2, reduction="max")
    with pytest.raises(SettingError, match="loaded from a file"):
        microbatch(graph.with_(retrace=None), 2)


def test_a_step_that_computes_with_new_weights_is_refused() -> None:
    torch.manual_seed(0)
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)

    def step(v: dict[str, Any], x: Tensor) -> Tensor:
        v["sgd"].zero_grad()
        v["one"](x).mean().backward()
        v["sgd"].step()
        (gradient,) = torch.autograd.grad(v["two"](v["one"](x)).mean(), [v["two"].weight])
        v["w"] = v["w"] - gradient
        return gradient.sum()

    variables = {"one": one, "two": two, "sgd": torch.optim.SGD(one.parameters(), lr=0.1), "w": torch.zeros(3, 3)}
    with pytest.raises(SettingError, match="cannot be taken in parts"):
        microbatch(trace(step, variables, torch.randn(4, 3)), 2)


def test_a_result_that_cannot_be_put_together_is_refused() -> None:
    def step(v: dict[str, Any], x: Tensor) -> dict[str, Tensor]:
        return {"loss": (v["w"] * x).sum(), "columns": x.sum(0)}

    graph = trace(step, {"w": torch.ones(3)}, torch.randn(4, 3))
    with pytest.raises(SettingError, match="columns"):
        microbatch(graph, 2)
