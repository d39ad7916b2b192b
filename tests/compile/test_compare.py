"""What counts as the same step: rounding, infinities and ties do; a missing, wrong or additional change does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.compile.steps import Said, broken, fresh, run_steps, step_graph
from torch import Tensor

import millrace.compile.tiered as tiered
from millrace.compile.compare import counted_fetches, difference, movements, tolerance
from millrace.compile.eager import compile_eager
from millrace.compile.tiered import Runner
from millrace.graph.graph import Graph
from millrace.graph.trace import trace

F32 = (1e-3, 0.1)
Spoil = Callable[[Sequence[Tensor], list[Tensor]], None]


def verdict(before: list[Tensor], compiled: list[Tensor], eager: list[Tensor]) -> str:
    return difference(movements(before, compiled), compiled, eager, [], [], F32, [])


@given(seed=st.integers(0, 2**16), noise=st.floats(0, 1e-6))
@settings(max_examples=30, deadline=None)
def test_rounding_is_no_difference(seed: int, noise: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    before = [torch.randn(n, generator=generator) for n in (3, 100)]
    after = [b + 0.01 * torch.randn(b.shape, generator=generator) for b in before]
    rounded = [a * (1 + noise * torch.randn(a.shape, generator=generator)) for a in after]
    assert verdict(before, rounded, after) == ""


@given(scale=st.floats(1e-4, 1e4))
@settings(max_examples=30, deadline=None)
def test_a_missing_update_is_seen_beside_any_other(scale: float) -> None:
    before = [torch.ones(3), torch.ones(1000)]
    eager = [torch.full((3,), 1.001), torch.full((1000,), 1 + scale)]
    assert "left as it was" in verdict(before, [torch.ones(3), eager[1]], eager)


def test_changes_that_should_not_be() -> None:
    before = [torch.ones(3), torch.tensor(4)]
    assert verdict(before, [torch.ones(3) + 1, torch.tensor(4)], before) != ""
    assert "int64" in verdict(before, [torch.ones(3), torch.tensor(5)], before)
    assert verdict(before, [torch.full((3,), torch.nan), torch.tensor(4)], before) != ""


def test_infinite_values_that_stay_are_no_difference() -> None:
    before = [torch.tensor([-torch.inf, 0.0, torch.inf])]
    after = [torch.tensor([-torch.inf, 1.0, torch.inf])]
    assert verdict(before, after, after) == ""
    assert verdict(before, [torch.tensor([-torch.inf, -1.0, torch.inf])], after) != ""
    assert verdict(before, [torch.tensor([0.0, 1.0, torch.inf])], after) != ""


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_that_rounds_is_compared_as_one(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    before = [torch.randn(8).to(dtype)]
    after = [before[0] * 2]
    assert verdict(before, [after[0] * 1.001], after) == ""
    assert verdict(before, [after[0] * -1], after) != ""


def test_an_empty_variable_differs_from_nothing() -> None:
    assert verdict([torch.empty(0)], [torch.empty(0)], [torch.empty(0)]) == ""


def fetch_verdict(a: Tensor, b: Tensor, counts: bool = False) -> str:
    return difference([], [], [], [a], [b], F32, [counts])


def test_fetches() -> None:
    assert fetch_verdict(torch.tensor(1.0), torch.tensor(1.0005)) == ""
    assert "fetch 0" in fetch_verdict(torch.tensor(1.0), torch.tensor(1.1))
    assert "instead of" in fetch_verdict(torch.ones(3), torch.ones(2))
    assert "int64" in fetch_verdict(torch.tensor([1, 2]), torch.tensor([1, 3]))
    assert fetch_verdict(torch.tensor([1, 2]), torch.tensor([1, 3]), counts=True) == ""
    assert fetch_verdict(torch.tensor(torch.nan), torch.tensor(torch.inf)) == ""
    assert fetch_verdict(torch.tensor(torch.nan), torch.tensor(1.0)) != ""


def test_which_fetches_only_count() -> None:
    def step(v: dict[str, Any], x: Tensor) -> dict[str, Tensor]:
        scores = (x @ v["w"]).relu()
        chosen = scores.argmax(1)
        v["n"] = v["n"] + 1
        return {
            "scores": scores,
            "chosen": chosen,
            "accuracy": (chosen == 1).float().mean(),
            "loss": scores[:, 0].mean() * (chosen == 1).float().mean(),
            "count": v["n"],
            "rate": v["n"] * 0.5,
        }

    graph = trace(step, {"w": torch.ones(3, 2), "n": torch.tensor(0)}, torch.ones(4, 3))
    counted = dict(zip(graph.fetches, counted_fetches(graph), strict=True))
    assert counted == {
        "scores": False, "chosen": True, "accuracy": True, "loss": False, "count": False, "rate": False
    }  # fmt: skip


def test_the_coarsest_dtype_decides_how_much_rounding_there_is() -> None:
    def step(v: dict[str, Any], x: Tensor) -> Tensor:
        return (x.to(v["dtype"].dtype) @ v["w"].to(v["dtype"].dtype)).sum().float()

    found = [
        tolerance(trace(step, {"w": torch.ones(3), "dtype": torch.ones(1, dtype=d)}, torch.ones(2, 3, dtype=f)))[0]
        for d, f in ((torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32))
    ]
    assert found == sorted(found)
    assert len(set(found)) >= 2


# -- a runner refuses ----------------------------------------------------------------------------------------------


def spoiled_runner(monkeypatch: pytest.MonkeyPatch, graph: Graph, spoil: Spoil, said: Said) -> Runner:
    """A runner whose "compiled" callable is the eager one and a fault."""
    monkeypatch.setattr(tiered, "compile_inductor", lambda g: broken(g, spoil, compile_eager(g)))
    return Runner(graph, "inductor", said.append)


def _wrong_loss(_: Sequence[Tensor], fetched: list[Tensor]) -> None:
    fetched[0].mul_(1.5)


def _crash(*_: object) -> None:
    raise AssertionError("expected size 6==6\nand a long explanation")


def _stale_bias(variables: Sequence[Tensor], _: object) -> None:
    position = [v.name for v in step_graph().variables].index("3.bias")
    variables[position].copy_(step_graph().initial["3.bias"].detach())


def _double_count(variables: Sequence[Tensor], _: object) -> None:
    position = [v.name for v in step_graph().variables].index("random")
    variables[position].add_(1)


@pytest.mark.parametrize("spoil", [_wrong_loss, _crash, _stale_bias, _double_count])
def test_a_step_that_disagrees_is_refused_and_training_goes_on(spoil: Spoil, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, said = step_graph(), Said()
    variables, twins = fresh(graph), fresh(graph)
    runner = spoiled_runner(monkeypatch, graph, spoil, said)
    assert run_steps(runner, variables, 4) == run_steps(compile_eager(graph), twins, 4)
    assert all(torch.equal(a, b) for a, b in zip(variables, twins, strict=True))
    assert runner.tier == "eager"
    assert said.only.startswith("staying eager: the compiled step ")


def test_a_step_that_agrees_is_swapped_in_although_the_model_holds_infinities(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, said = step_graph(), Said()
    runner = spoiled_runner(monkeypatch, graph, lambda *_: None, said)
    run_steps(runner, fresh(graph), 2)
    assert runner.tier == "inductor"
    assert "swapped in at call 1" in said.only


def test_nan_proves_nothing_and_the_next_batch_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways the variables become NaN: what differs then (NaN from NaN) is no fault of the compiler's."""
    graph, said = step_graph(), Said()
    runner = spoiled_runner(monkeypatch, graph, lambda *_: None, said)
    variables = fresh(graph)
    bad = torch.full((6, 4), torch.nan)
    runner(variables, [bad, torch.zeros(6, dtype=torch.int64)])
    assert said == []
    assert runner.tier == "eager"
    for variable, value in zip(variables, fresh(graph), strict=True):
        variable.copy_(value)
    run_steps(runner, variables, 1)
    assert runner.tier == "inductor"


def test_a_bad_batch_leaves_the_proof_to_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, said = step_graph(), Said()
    runner = spoiled_runner(monkeypatch, graph, lambda *_: None, said)
    variables = fresh(graph)
    with pytest.raises((IndexError, RuntimeError)):
        runner(variables, [torch.ones(6, 4), torch.full((6,), 99)])
    assert said == []
    for variable, value in zip(variables, fresh(graph), strict=True):
        variable.copy_(value)
    run_steps(runner, variables, 1)
    assert runner.tier == "inductor"
