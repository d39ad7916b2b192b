"""Two halves, one after the other, are the step; with the mean of slices in between they are the step on them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from tests.graph.programs import equal_bits, programs
from tests.graph.step_models import MODELS, SIZE, batch_of, step_graph
from torch import Tensor, nn

from millrace.errors import SettingError
from millrace.graph.check import check
from millrace.graph.graph import TRAIN, Graph
from millrace.graph.passes.halves import Halves, halves
from millrace.graph.passes.splitting.split import split
from millrace.graph.random import new_random, slice_random, uniform
from millrace.graph.signature import Role
from millrace.graph.trace import trace
from millrace.runtime.session import Session

STEPS = 3

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("mlp", "sgd", {}),
    ("mlp", "groups", {}),
    ("mlp", "momentum", {"accumulate": 2}),
    ("mlp", "adamw", {"schedule": lambda step: 1 / (1 + step)}),
    ("mlp", "adamw", {"precision": "bfloat16", "dtype": torch.float32}),
    ("mlp", "millrace momentum accumulated", {}),
    ("dropout", "momentum", {}),
    ("cnn", "momentum", {}),
    ("cnn", "millrace adam clipped", {}),
    ("embedding", "sgd", {}),
    ("embedding", "adagrad", {}),
    ("tied", "adamw", {}),
    ("lstm", "millrace adam clipped", {}),
    ("transformer", "momentum", {}),  # by Adam a bias of keys, whose gradient is 0 but for rounding, would differ
    ("transformer with dropout", "adamw", {}),
]
SMOOTH = [case for case in CASES if case[0] in ("mlp", "embedding", "tied", "transformer") and "dtype" not in case[2]]
SMOOTH += [("mlp", "millrace adam clipped", {})]


def whole_run(graph: Graph, batches: Sequence[Any]) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The fetches of every step, and the variables after the last."""
    session = Session(graph, copy=True, compile="eager")
    found = [session.run([TRAIN, *graph.fetches], batch)[1:] for batch in batches]
    return [dict(zip(graph.fetches, values, strict=True)) for values in found], dict(session.variables)


def run_in_halves(
    graph: Graph, batches: Sequence[Any], sizes: Sequence[int]
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The same with every batch cut into slices of these sizes (the fetches are those of the last slice)."""
    cut = halves(graph)
    variables = {name: tensor.detach().clone() for name, tensor in graph.initial.items()}
    first = Session(check(cut.gradients), variables, compile="eager", warn_new_shape=False)
    second = Session(check(cut.update), variables, compile="eager")
    fetched = []
    for batch in batches:
        slices = zip(*(tensor.split(list(sizes)) for tensor in batch), strict=True)
        found = [run_all(first, part) for part in slices]
        given = {feed.name: mean([values[feed.name] for values in found], sizes) for feed in cut.exchanged}
        fetched.append(found[-1] | run_all(second, given))
    return fetched, variables


def run_all(session: Session, feed: Any) -> dict[str, Tensor]:
    names = list(session.graph.fetches)
    return dict(zip(names, session.run([TRAIN, *names], feed)[1:], strict=True))


def mean(values: Sequence[Tensor], weights: Sequence[int]) -> Tensor:
    if len(values) == 1:
        return values[0]
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)  # type: ignore[return-value]


def batches_of(model: str, dtype: torch.dtype = torch.float64) -> list[Any]:
    return [batch_of(MODELS[model][1], seed=seed, dtype=dtype) for seed in range(STEPS)]


def differing(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in expected.items() if not equal_bits([found[name]], [tensor])]


@pytest.mark.parametrize(("model", "optimizer", "how"), CASES)
def test_one_after_the_other_they_are_the_step_bit_for_bit(model: str, optimizer: str, how: dict[str, Any]) -> None:
    graph = step_graph(model, optimizer, **how)
    batches = batches_of(model, how.get("dtype", torch.float64))
    expected, variables = whole_run(graph, batches)
    found, left = run_in_halves(graph, batches, [SIZE])
    assert differing(left, variables) == []
    assert [differing(a, b) for a, b in zip(found, expected, strict=True)] == [[]] * STEPS


@pytest.mark.parametrize(("model", "optimizer", "how"), SMOOTH)
def test_the_mean_of_slices_is_the_whole_batch(model: str, optimizer: str, how: dict[str, Any]) -> None:
    graph = step_graph(model, optimizer, **how)
    _, variables = whole_run(graph, batches_of(model))
    _, left = run_in_halves(graph, batches_of(model), (1, 3, 2) if optimizer == "groups" else (2, 4))
    for name, tensor in variables.items():
        torch.testing.assert_close(left[name], tensor, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@settings(max_examples=6, deadline=None)
@given(program=programs)
def test_random_programs_in_halves(program: Any) -> None:
    graph = program.graph()
    batches = [(torch.full((4, 4), 0.3, dtype=torch.float64),)] * 2
    expected, variables = whole_run(graph, [batch[0] for batch in batches])
    cut = halves(graph)
    values = {name: tensor.detach().clone() for name, tensor in graph.initial.items()}
    first, second = Session(check(cut.gradients), values, compile="eager"), Session(check(cut.update), values)
    for batch, wanted in zip(batches, expected, strict=True):
        found = run_all(first, batch[0])
        assert differing(found | run_all(second, {f.name: found[f.name] for f in cut.exchanged}), wanted) == []
    assert differing(values, variables) == []


@pytest.mark.parametrize(
    ("model", "optimizer"), [("cnn", "millrace adam clipped"), ("transformer", "momentum"), ("mlp", "adamw")]
)
def test_split_layers_exchange_their_blocks(model: str, optimizer: str) -> None:
    graph = split(step_graph(model, optimizer), 2, min_width=4)
    cut = halves(graph)
    names = [feed.name for feed in cut.exchanged]
    assert names == [f"gradient/{v.name}" for v in graph.variables if v.role is Role.PARAMETER]
    assert any(name.endswith(("[4:8]", "[2:4]")) for name in names)
    _, variables = whole_run(graph, batches_of(model))
    _, left = run_in_halves(graph, batches_of(model), [SIZE])
    assert differing(left, variables) == []
    if model == "mlp":
        _, left = run_in_halves(graph, batches_of(model), [2, 4])
        for name, tensor in variables.items():
            torch.testing.assert_close(left[name], tensor, rtol=1e-9, atol=1e-12)


def test_each_half_has_what_is_its_own() -> None:
    graph = step_graph("cnn", "momentum")
    cut = halves(graph)
    parameters = [v.name for v in graph.variables if v.role is Role.PARAMETER]
    assert [feed.name for feed in cut.exchanged] == [f"gradient/{name}" for name in parameters]
    assert set(cut.gradients.updates) == {"1.running_mean", "1.running_var", "1.num_batches_tracked", "random"}
    assert set(cut.gradients.fetches) == set(graph.fetches)
    assert {v.role for v in cut.gradients.variables} == {Role.PARAMETER, Role.BUFFER, Role.RANDOM}
    assert {v.role for v in cut.update.variables} == {Role.PARAMETER, Role.OPTIMIZER, Role.STEP}
    assert set(cut.update.variables) | set(cut.gradients.variables) == set(graph.variables)
    assert all(cut.update.initial[v.name] is graph.initial[v.name] for v in cut.update.variables)
    assert cut.update.feeds == cut.exchanged


@pytest.mark.parametrize("size", [1, 5])
def test_another_batch_size_has_the_same_exchange_and_the_same_update(size: int) -> None:
    for graph in (step_graph("tied", "adamw"), split(step_graph("mlp", "adamw"), 2, min_width=4)):
        cut, kind = halves(graph), "words" if "table.weight" in graph.initial else "numbers"
        assert graph.retrace is not None
        other = halves(graph.retrace(batch_of(kind, size)))
        assert other.exchanged == cut.exchanged
        assert run_update(other) == run_update(cut)
        assert cut.gradients.retrace is not None
        again = check(cut.gradients.retrace(batch_of(kind, size)))
        assert again.feeds[0].spec.shape[0] == size
        assert list(again.fetches) == list(cut.gradients.fetches)
        assert again.variables == cut.gradients.variables


def run_update(cut: Halves) -> dict[str, list[float]]:
    """The variables after one update with the numbers 0, 0.1, 0.2, … as gradients."""
    session = Session(cut.update, copy=True, compile="eager")
    given = {f.name: torch.arange(f.spec.size_bytes // 8).double().reshape(f.spec.shape) / 10 for f in cut.exchanged}
    run_all(session, given)
    return {name: tensor.flatten().tolist() for name, tensor in session.variables.items()}


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
    with pytest.raises(SettingError, match=r"test_halves.py:\d+.* already changed"):
        halves(trace(step, variables, torch.randn(4, 3)))


def test_a_count_that_the_update_reads_is_refused() -> None:
    def step(v: dict[str, Any], batch: Any) -> Tensor:
        w, (x, labels) = v["w"], batch
        loss = (w * x).sum()
        v["seen"] = v["seen"] + (labels > 0).sum()
        v["w"] = w - 0.1 * torch.autograd.grad(loss, w)[0]
        return loss

    variables = {"w": torch.ones(3, requires_grad=True), "seen": torch.zeros((), dtype=torch.int64)}
    feed = (torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(SettingError, match=r"test_halves.py:\d+.*depends on the batch and is not floating"):
        halves(trace(step, variables, feed))


def test_a_value_of_every_example_is_refused_when_the_batch_is_divided() -> None:
    def step(v: dict[str, Any], x: Tensor) -> Tensor:
        w = v["w"]
        loss = (w * x).sum()
        v["last"] = 0.5 * v["last"] + x.sum(1).cumsum(0)[-1:]
        v["w"] = w - 0.1 * torch.autograd.grad(loss, w)[0]
        return loss

    graph = trace(step, {"w": torch.ones(3, requires_grad=True), "last": torch.zeros(1)}, torch.randn(4, 3))
    cut = halves(graph)
    assert cut.gradients.retrace is not None
    with pytest.raises(SettingError, match=r"f32\[4, 3\] and is f32\[2, 3\]"):
        cut.gradients.retrace(torch.randn(2, 3))


def test_noise_that_only_the_update_draws_stays_with_it_and_noise_of_both_is_refused() -> None:
    def step(v: dict[str, Any], x: Tensor) -> Tensor:
        w = v["w"]
        loss = (w * x).sum()
        gradient = torch.autograd.grad(loss, w)[0]
        v["w"] = w - 0.1 * (gradient + torch.randn_like(gradient))
        return loss

    def both(v: dict[str, Any], x: Tensor) -> Tensor:
        return step(v, x * torch.rand_like(x))

    feed = torch.randn(4, 3)
    graph = trace(step, {"w": torch.ones(3, requires_grad=True)}, feed)
    assert "random" in halves(graph).update.updates
    expected, variables = whole_run(graph, [feed, feed])
    cut, left = halves(graph), {name: tensor.detach().clone() for name, tensor in graph.initial.items()}
    first, second = Session(cut.gradients, left, compile="eager"), Session(cut.update, left, compile="eager")
    for _ in expected:
        found = run_all(first, feed)
        run_all(second, {f.name: found[f.name] for f in cut.exchanged})
    assert differing(left, variables) == []
    with pytest.raises(SettingError, match="'random'"):
        halves(trace(both, {"w": torch.ones(3, requires_grad=True)}, feed))


def test_an_average_of_new_statistics_gets_them_from_the_forward_pass() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(v: dict[str, Any], x: Tensor) -> Tensor:
        old = model[1].running_mean * 2
        loss = model(x).square().sum()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        with torch.no_grad():
            v["average"] = 0.9 * v["average"] + 0.1 * model[1].running_mean + old
            v["count"] = model[1].num_batches_tracked + v["count"]
        return loss

    feed = torch.randn(4, 3).double()
    given = {"": model, "sgd": sgd, "average": torch.zeros(3).double(), "count": torch.tensor(0)}
    graph = trace(step, given, feed)
    batches = [feed, feed + 1]
    _, variables = whole_run(graph, batches)
    cut, left = halves(graph), {name: tensor.detach().clone() for name, tensor in graph.initial.items()}
    first, second = Session(check(cut.gradients), left, compile="eager"), Session(check(cut.update), left)
    for batch in batches:
        found = run_all(first, batch)
        run_all(second, {f.name: found[f.name] for f in cut.exchanged})
    assert differing(left, variables) == []


def test_slices_draw_apart_and_the_first_as_ever() -> None:
    random = torch.tensor([7, 5])
    assert slice_random(random, 0) is random
    streams = [uniform(slice_random(random, index), 1, [64]) for index in range(20)]
    streams += [uniform(slice_random(new_random(8), index), 1, [64]) for index in range(20)]
    for i, a in enumerate(streams):
        for b in streams[:i]:
            assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.6
    for index in range(1, 20):
        found = slice_random(random, index)
        assert found.equal(slice_random(random.clone(), index))
        assert found.dtype == torch.int64
        assert found[1] == 5
        assert found[0] == slice_random(torch.tensor([7, 6]), index)[0]


def test_a_fetched_view_of_a_weight_shows_the_new_one() -> None:
    def step(v: dict[str, Any], x: Tensor) -> dict[str, Tensor]:
        w, turned = v["w"], v["w"].t()
        loss = (turned @ x).square().sum()
        v["w"] = w - 0.1 * torch.autograd.grad(loss, w)[0]
        return {"loss": loss, "turned": turned}

    feed = torch.randn(3, 3).double()
    graph = trace(step, {"w": torch.eye(3).double().requires_grad_()}, feed)
    expected, _ = whole_run(graph, [feed])
    cut = halves(graph)
    assert list(cut.update.fetches) == ["turned"]
    found = run_all(Session(cut.gradients, copy=True, compile="eager"), feed)
    given = {f.name: found[f.name] for f in cut.exchanged}
    assert run_all(Session(check(cut.update), copy=True, compile="eager"), given)["turned"].equal(expected[0]["turned"])
