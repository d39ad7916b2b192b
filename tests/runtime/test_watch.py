"""Looking at tensors in flight, and finding the node that made the first NaN or that raises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from tests.graph.programs import Program, programs
from tests.small import copied, cross_entropy, differing, dropout_mlp, labelled, mlp
from torch import Tensor, nn

from millrace import Session, training_graph
from millrace.compile.eager import compile_eager
from millrace.errors import StepError
from millrace.graph.graph import Graph
from millrace.graph.trace import trace
from millrace.runtime.watch import Watch, failing_node, first_nonfinite, run_watched


def session_of(model: nn.Module, batch: Any = None) -> Session:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return Session(training_graph(model, cross_entropy, optimizer, batch or labelled()), compile="eager")


# -- hooks -------------------------------------------------------------------------------------------------------------


@given(program=programs)
@settings(max_examples=30, deadline=None)
def test_every_tensor_is_shown_once_and_the_step_is_the_same(program: Program) -> None:
    graph = program.graph()
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    watched, plain = [t.clone() for t in inputs[:2]], [t.clone() for t in inputs[:2]]
    seen: list[str] = []
    found = run_watched(graph, watched, inputs[2:], [Watch("*", lambda name, _: seen.append(name))])
    expected = compile_eager(graph)(plain, inputs[2:])
    assert all(torch.equal(a, b) for a, b in zip([*found, *watched], [*expected, *plain], strict=True))
    assert seen == [n.name for n in graph.nodes if isinstance(n.meta["val"], Tensor)]


def test_what_was_shown_is_not_changed_by_later_steps() -> None:
    session = session_of(mlp())
    seen: dict[str, Tensor] = {}
    with session.watching("*", seen.__setitem__):
        session.run(["train", "loss"], labelled())
    kept = copied(seen)
    for _ in range(3):
        session.run(["train", "loss"], labelled(seed=9))
    assert "t" in seen  # a weight, transposed: a view of a variable
    assert differing(seen, kept) == []


def test_patterns_are_of_node_names_and_of_modules() -> None:
    session = session_of(dropout_mlp())
    names: list[str] = []
    with (
        session.watching("3", lambda name, _: names.append(name)),
        session.watching("tan?", lambda n, _: names.append(n)),
    ):
        session.run("loss", labelled())
    scopes = {session.graph.node(name).meta["millrace"].scope for name in names}
    assert scopes == {"1", "3"}
    assert "tanh" in names


def test_an_observer_that_raises_stops_the_step_before_it_changes_anything() -> None:
    session = session_of(mlp())
    before = copied(session.variables)

    def refuse(name: str, tensor: Tensor) -> None:
        raise ValueError("I have seen enough")

    with pytest.raises(ValueError, match="I have seen enough"), session.watching("tanh", refuse):
        session.run("train", labelled())
    assert differing(before, session.variables) == []


# -- the first NaN -----------------------------------------------------------------------------------------------------


def graph_of(function: Any, w: Tensor, x: Tensor) -> Graph:
    def step(v: dict[str, Any], x: Tensor) -> Tensor:
        result = function(v["w"], x)
        (gradient,) = torch.autograd.grad(result.sum(), v["w"])
        v["w"] = v["w"] - gradient
        return result.sum()

    return trace(step, {"w": w.clone().requires_grad_()}, x)


def says(function: Any, w: list[float], x: list[float]) -> str:
    values = torch.tensor(w), torch.tensor(x)
    return first_nonfinite(graph_of(function, *values), [values[0]], [values[1]])


def test_a_step_without_nan_has_nothing_to_say() -> None:
    assert says(lambda w, x: w * x, [1.0, 2.0], [3.0, 4.0]) == ""


def test_the_node_and_its_line_are_named() -> None:
    said = says(lambda w, x: (w * x).log().exp(), [1.0, -2.0], [3.0, 4.0])
    assert said.startswith("node 'log' (aten.log.default, forward")
    assert "test_watch.py" in said
    assert "1 of 2 values" in said


def test_a_nan_that_only_the_backward_pass_makes() -> None:
    """sqrt is 0 at 0; its slope there is infinite, and 0 times infinity is NaN."""
    said = says(lambda w, x: (w * w).sqrt() * x, [0.0, 1.0], [1.0, 1.0])
    assert "backward" in said
    assert "NaN" in said


def test_an_infinity_on_the_way_is_named_before_the_nan() -> None:
    said = says(lambda w, x: (w * x).exp() - (w * x).exp(), [1000.0], [1.0])
    infinite, nan = said.split("; then ")
    assert infinite.startswith("node 'exp'")
    assert "1 values infinite" in infinite
    assert nan.startswith("node 'sub'")


def test_a_bad_input_is_named_itself() -> None:
    assert "the feed 'batch' is not finite to begin with (1 of 2 values)" in says(
        torch.mul, [1.0, 1.0], [1.0, torch.nan]
    )
    assert "the variable 'w' is not finite to begin with (2 of 2 values)" in says(
        torch.mul, [torch.nan] * 2, [1.0, 1.0]
    )


def test_an_infinite_mask_does_not_hide_the_node_that_makes_the_nan() -> None:
    said = says(lambda w, x: torch.softmax(w + x, 0).log(), [0.0, 0.0], [-torch.inf, 0.0])
    assert "the feed 'batch' is not finite to begin with (1 of 2 values)" in said
    assert "; then node" in said
    all_masked = says(lambda w, x: torch.softmax(w + x, 0), [0.0, 0.0], [-torch.inf, -torch.inf])
    assert "; then node '_softmax" in all_masked


def test_looking_for_a_nan_changes_nothing() -> None:
    session = session_of(mlp())
    session.variables["0.weight"].fill_(1e300)
    before = copied(session.variables)
    assert session.first_nonfinite((labelled()[0] * 1e300, labelled()[1])) != ""
    assert differing(before, session.variables) == []


def test_a_complex_nan_is_one() -> None:
    said = says(lambda w, x: torch.complex(w, (x - x) / (x - x)).abs(), [1.0], [1.0])
    assert "'div'" in said
    value = torch.complex(torch.tensor([1.0]), torch.tensor([torch.nan]))
    graph = trace(lambda v, x: x.abs().sum() + v["w"], {"w": torch.tensor(0.0)}, value)
    assert "the feed 'batch' is not finite" in first_nonfinite(graph, [torch.tensor(0.0)], [value])


# -- the node that raises ----------------------------------------------------------------------------------------------


def test_the_node_that_raises_is_named_with_its_module() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3)).double()
    batch = (torch.tensor([[0, 1]] * 6), labelled()[1])
    session = session_of(model, batch)
    graph, variables = session.graph, list(session.variables.values())
    assert failing_node(graph, variables, list(batch)) is None
    found = failing_node(graph, variables, [batch[0] + 4, batch[1]])
    assert found is not None
    assert "embedding" in found
    assert "in module '0'" in found


def test_a_failing_step_is_an_error_of_ours_that_keeps_what_pytorch_said() -> None:
    """Only the step itself can know: the index is computed in it."""

    def step(v: dict[str, Any], x: Tensor) -> Tensor:
        v["n"] = v["n"] + 1
        return v["w"].index_select(0, (x * 2).long()).sum()

    session = Session(trace(step, {"w": torch.ones(3), "n": torch.tensor(0)}, torch.zeros(2)), compile="eager")
    assert session.run("result", torch.zeros(2)).item() == 2
    with pytest.raises(StepError, match=r"(?s)node 'index_select'.*PyTorch said: .*out of range") as caught:
        session.run("result", torch.full((2,), 9.0))
    assert isinstance(caught.value.__cause__, (IndexError, RuntimeError))
