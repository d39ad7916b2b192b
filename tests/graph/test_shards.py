"""Shards of an update, each by itself, do what the whole update does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.graph.programs import equal_bits
from tests.graph.step_models import batch_of, step_graph
from torch import Tensor, nn

import millrace
from millrace.errors import SettingError
from millrace.graph.check import check
from millrace.graph.graph import TRAIN, Graph
from millrace.graph.passes.halves import halves
from millrace.graph.passes.shards import Shard, shards
from millrace.graph.passes.splitting.split import split
from millrace.graph.signature import Role
from millrace.graph.trace import trace
from millrace.graph.training import training_graph
from millrace.runtime.session import Session

CASES = [
    ("mlp", "sgd", {}),
    ("mlp", "groups", {}),
    ("mlp", "momentum", {"accumulate": 2}),
    ("mlp", "adamw", {"schedule": lambda step: 1 / (1 + step)}),
    ("mlp", "millrace momentum accumulated", {}),
    ("lstm", "adagrad", {}),
]


def check_shards(update: Graph, found: tuple[Shard, ...], steps: int = 3) -> None:
    """Every variable of the whole update is in a shard, and after some updates it has the same bits in all of them."""
    whole = Session(update, copy=True, compile="eager")
    parts = [Session(check(shard.graph), copy=True, compile="eager") for shard in found]
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        given = {f.name: torch.randn(f.spec.shape, generator=generator, dtype=f.spec.dtype) for f in update.feeds}
        fetches = list(update.fetches)
        wanted = dict(zip(fetches, whole.run([TRAIN, *fetches], given)[1:], strict=True))
        for shard, part in zip(found, parts, strict=True):
            own = list(shard.graph.fetches)
            values = part.run([TRAIN, *own], {name: given[name] for name in shard.exchanged})[1:]
            assert equal_bits(values, [wanted.pop(name) for name in own])
        assert not wanted
    held: dict[str, list[Tensor]] = {}
    for shard, part in zip(found, parts, strict=True):
        assert list(part.variables) == list(shard.variables)
        for name, tensor in part.variables.items():
            held.setdefault(name, []).append(tensor)
    assert held.keys() == whole.variables.keys()
    for name, tensors in held.items():
        assert all(equal_bits([tensor], [whole.variables[name]]) for tensor in tensors), name
        assert len(tensors) == 1 or tensors[0].ndim == 0, f"{name} is in {len(tensors)} shards"


@settings(max_examples=10, deadline=None)
@given(case=st.sampled_from(CASES), count=st.integers(1, 4), blocks=st.sampled_from([1, 3]))
def test_the_shards_together_are_the_update(case: tuple[str, str, dict[str, Any]], count: int, blocks: int) -> None:
    model, optimizer, how = case
    update = halves(split(step_graph(model, optimizer, **how), blocks, min_width=6)).update
    found = shards(update, count)
    assert len(found) == count
    check_shards(update, found)
    assert sorted(name for shard in found for name in shard.exchanged) == sorted(f.name for f in update.feeds)
    assert [shard.variables for shard in shards(update, count)] == [shard.variables for shard in found]


def test_a_parameter_is_with_its_slots_and_every_gradient_goes_to_one_shard() -> None:
    update = halves(step_graph("transformer", "adamw")).update
    for shard in shards(update, 3):
        owners = {update.variable(name).owner for name in shard.variables}
        parameters = [name for name in shard.variables if update.variable(name).role is Role.PARAMETER]
        assert list(shard.exchanged) == [f"gradient/{name}" for name in parameters]
        assert owners - set(parameters) <= {"step", "optimizer/lr", "table.weight"}  # the counter of all is the first's
        for name in parameters:
            assert {f"optimizer/{name}/exp_avg", f"optimizer/{name}/exp_avg_sq"} <= set(shard.variables)
        assert {"step", "optimizer/lr", "optimizer/table.weight/step"} <= set(shard.variables)


def test_shards_are_of_like_size_and_a_large_tensor_stays_whole() -> None:
    torch.manual_seed(0)
    sizes = [700, 10, 90, 80, 70, 60, 50, 40]
    weights = {f"w{i}": torch.randn(n, requires_grad=True) for i, n in enumerate(sizes)}

    def step(v: dict[str, Any], x: Tensor) -> Tensor:
        loss = sum((v[name] * x).square().sum() for name in weights)
        for name, gradient in zip(weights, torch.autograd.grad(loss, [v[n] for n in weights]), strict=True):
            v[name] = v[name] - 0.1 * gradient
        return loss

    graph = trace(step, weights, torch.randn(1))
    held = [sorted(int(name[1:]) for name in shard.variables) for shard in shards(halves(graph).update, 3)]
    assert held[0] == [0]
    assert abs(sum(sizes[i] for i in held[1]) - sum(sizes[i] for i in held[2])) <= 20


def test_clipping_by_the_norm_is_refused_with_the_line() -> None:
    update = halves(step_graph("mlp", "millrace adam clipped")).update
    with pytest.raises(SettingError, match=r"'stack' \(.*:\d+.*parameter_servers=1, .*by value"):
        shards(update, 2)
    (only,) = shards(update, 1)
    check_shards(update, (only,))
    assert only.exchanged == tuple(feed.name for feed in update.feeds)


def test_clipping_in_a_step_of_ones_own_is_refused_with_its_line() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(_: Mapping[str, Any], x: Tensor) -> Tensor:
        sgd.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        sgd.step()
        return loss

    update = halves(trace(step, {"": model, "sgd": sgd}, torch.randn(2, 4))).update
    with pytest.raises(SettingError, match=r"test_shards\.py:\d+ in step\).*on different servers"):
        shards(update, 2)
    check_shards(update, shards(update, 1))


def test_norms_of_two_modules_allow_two_shards() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)).double()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(_: Mapping[str, Any], x: Tensor) -> dict[str, Tensor]:
        sgd.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        norms = [torch.nn.utils.clip_grad_norm_(layer.parameters(), 0.01) for layer in model]
        sgd.step()
        return {"loss": loss, "first": norms[0], "second": norms[1]}

    update = halves(trace(step, {"": model, "sgd": sgd}, torch.randn(2, 4).double())).update
    found = shards(update, 2)
    check_shards(update, found)
    assert {frozenset(shard.exchanged) for shard in found} == {
        frozenset({"gradient/0.weight", "gradient/0.bias"}),
        frozenset({"gradient/1.weight", "gradient/1.bias"}),
    }
    with pytest.raises(SettingError, match="at most 2 servers"):
        shards(update, 3)


def test_more_shards_than_parameters_are_refused() -> None:
    update = halves(step_graph("mlp", "adamw")).update
    assert len(shards(update, 4)) == 4
    with pytest.raises(SettingError, match=r"has 4 trained tensors.*at most 4"):
        shards(update, 5)
    with pytest.raises(SettingError, match="at least 1"):
        shards(update, 0)


def test_an_average_of_the_weights_stays_with_them_and_a_number_of_the_batch_goes_to_all() -> None:
    torch.manual_seed(0)
    weights = {name: torch.randn(5, dtype=torch.float64, requires_grad=True) for name in ("a", "b", "c")}

    def step(v: dict[str, Any], x: Tensor) -> Tensor:
        loss = sum((v[name] * x).square().sum() for name in weights)
        gradients = torch.autograd.grad(loss, [v[n] for n in weights])
        with torch.no_grad():
            v["typical"] = 0.9 * v["typical"] + 0.1 * loss
            for name, gradient in zip(weights, gradients, strict=True):
                v[name] = v[name] - 0.1 * gradient / v["typical"]
            v["average"] = 0.9 * v["average"] + 0.1 * v["b"]
        return loss

    more = {"typical": torch.ones((), dtype=torch.float64), "average": torch.zeros(5, dtype=torch.float64)}
    update = halves(trace(step, weights | more, torch.randn(3, 5).double())).update
    found = shards(update, 3)
    check_shards(update, found)
    (home,) = [shard for shard in found if "average" in shard.variables]
    assert "b" in home.variables
    assert all("typical" in shard.variables for shard in found)


def test_tied_and_lone_numbers() -> None:
    torch.manual_seed(0)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(4, 3), nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.scale

    model = Scaled().double()
    graph = training_graph(model, lambda m, b: m(b[0]).square().mean(), millrace.optim.adam(0.1), batch_of("numbers"))
    update = halves(graph).update
    found = shards(update, 3)
    check_shards(update, found)
    (home,) = [shard for shard in found if "scale" in shard.variables]
    assert home.exchanged == ("gradient/scale",)
    tied = halves(step_graph("tied", "adamw")).update
    check_shards(tied, shards(tied, 1))
