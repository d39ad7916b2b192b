"""Loops and branches inside the graph: the values and gradients of the Python that they stand for."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops import while_loop

from millrace import Session
from millrace.errors import TraceError
from millrace.graph import Graph, cond, load_graph, map_, save_graph, scan, training_graph
from millrace.graph.trace import trace

from .against_eager import Runner, default_dtype, match_eager, training

# Each is written once as a node and once in plain Python, over a module whose parameters the bodies close over.


class Recurrence(nn.Module):
    """A recurrence that carries (sum, hidden state) along a sequence and leaves every hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.scale = nn.Linear(6, 3), nn.Parameter(torch.tensor(0.5))

    def one(self, carry: tuple[Tensor, Tensor], x: Tensor, shift: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        total, hidden = carry
        hidden = torch.tanh(self.cell(torch.cat([hidden, x], -1)) * self.scale + shift)
        return (total + hidden.pow(2).sum(), hidden), hidden * 2

    def start(self, xs: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros((), dtype=xs.dtype), torch.zeros(3, dtype=xs.dtype)

    def forward(self, xs: Tensor) -> Tensor:
        (total, hidden), ys = scan(self.one, self.start(xs), xs, xs[0] * 0.1)
        return total + hidden.sum() + ys.pow(3).sum()

    def plain(self, xs: Tensor) -> Tensor:
        carry, ys = self.start(xs), []
        for x in xs:
            carry, y = self.one(carry, x, xs[0] * 0.1)
            ys.append(y)
        return carry[0] + carry[1].sum() + torch.stack(ys).pow(3).sum()


class Mapped(nn.Module):
    """A function of every row, with a nested result."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def row(self, x: dict[str, Tensor], bias: Tensor) -> dict[str, Tensor]:
        hidden = torch.sigmoid(self.inner(x["a"])) + bias
        return {"sum": hidden.sum(), "outer": torch.outer(hidden, x["b"])}

    def forward(self, xs: Tensor) -> Tensor:
        found = map_(self.row, {"a": xs, "b": xs.flip(0)}, xs.mean(0))
        return found["sum"].pow(2).sum() + found["outer"].sum()

    def plain(self, xs: Tensor) -> Tensor:
        rows = [self.row({"a": a, "b": b}, xs.mean(0)) for a, b in zip(xs, xs.flip(0), strict=True)]
        return sum((row["sum"] ** 2 + row["outer"].sum() for row in rows), torch.zeros((), dtype=xs.dtype))


class Branching(nn.Module):
    """A branch for the whole batch, decided by its values."""

    def __init__(self, branch: Callable[..., Any]) -> None:
        super().__init__()
        self.yes, self.no, self.branch = nn.Linear(3, 3), nn.Linear(3, 3), branch

    def forward(self, xs: Tensor) -> Tensor:
        return self.branch(xs.sum() > 0, lambda x: self.yes(x).tanh(), lambda x: self.no(x).sin(), (xs,)).pow(2).sum()

    def plain(self, xs: Tensor) -> Tensor:
        return (self.yes(xs).tanh() if xs.sum() > 0 else self.no(xs).sin()).pow(2).sum()


class Nested(nn.Module):
    """A branch inside a loop, around a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.grow, self.shrink = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, xs: Tensor) -> Tensor:
        def one(carry: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            new = cond(x.sum() > 0, lambda c: self.grow(c), lambda c: self.shrink(c).tanh(), (carry + x,))
            return new, new.sum()

        last, sums = scan(one, torch.zeros(3, dtype=xs.dtype), xs)
        return last.pow(2).sum() + sums.sum()

    def plain(self, xs: Tensor) -> Tensor:
        carry, total = torch.zeros(3, dtype=xs.dtype), torch.zeros((), dtype=xs.dtype)
        for x in xs:
            carry = self.grow(carry + x) if x.sum() > 0 else self.shrink(carry + x).tanh()
            total = total + carry.sum()
        return carry.pow(2).sum() + total


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "scan": (Recurrence, "scan"),
    "map_": (Mapped, "map_impl"),
    "cond": (lambda: Branching(cond), "cond"),
    "torch.cond": (lambda: Branching(torch.cond), "cond"),
    "cond in scan": (Nested, "scan"),
}
each_model = pytest.mark.parametrize("name", MODELS)


def sequences() -> list[Tensor]:
    """Alternately with a positive and a negative sum, so that both branches run."""
    return [torch.randn(4, 3, dtype=torch.float64).abs() * sign for sign in (1, -1, 1)]


def made(name: str) -> Any:
    torch.manual_seed(1)
    return MODELS[name][0]().double()


def operators(graph: Graph) -> list[str]:
    return [node.target.name() for node in graph.nodes if isinstance(node.target, torch._ops.HigherOrderOperator)]


@each_model
def test_forward_and_gradient_are_those_of_plain_python(name: str) -> None:
    def step(v: dict[str, Any], xs: Tensor) -> dict[str, Tensor]:
        loss = v[""](xs)
        parameters = dict(v[""].named_parameters())
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        return {"loss": loss, **dict(zip(parameters, gradients, strict=True))}

    model = made(name)
    runner = Runner(trace(step, {"": model}, sequences()[0]))
    assert MODELS[name][1] in operators(runner.graph), "the loop or branch is not a node of the graph"
    for xs in sequences():
        expected = model.plain(xs)
        gradients = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True, materialize_grads=True)
        got = runner.step(xs)
        torch.testing.assert_close(got["loss"], expected.detach(), rtol=1e-12, atol=1e-12)
        for (parameter, _), want in zip(model.named_parameters(), gradients, strict=True):
            torch.testing.assert_close(got[parameter], want, rtol=1e-10, atol=1e-12)


@each_model
def test_outside_of_a_step_they_are_plain_python(name: str) -> None:
    model = made(name)
    for xs in sequences():
        torch.testing.assert_close(model(xs), model.plain(xs), rtol=1e-12, atol=1e-12)


@each_model
def test_five_steps_of_training_agree_with_eager(name: str) -> None:
    model = made(name)
    reference = copy.deepcopy(model)
    graph = training_graph(model, lambda m, xs: m(xs), torch.optim.Adam(model.parameters(), lr=1e-2), sequences()[0])
    session = Session(graph, compile="eager")
    optimizer = torch.optim.Adam(reference.parameters(), lr=1e-2)
    for step in range(5):
        xs = sequences()[step % 3]
        _, loss = session.run(["train", "loss"], xs)
        optimizer.zero_grad(set_to_none=False)
        expected = reference.plain(xs)
        for parameter, gradient in zip(
            reference.parameters(),
            torch.autograd.grad(expected, list(reference.parameters()), allow_unused=True, materialize_grads=True),
            strict=True,
        ):
            parameter.grad = gradient  # zero for the branch that was not taken, as in the graph
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=1e-12)
    for got, want in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_a_loop_in_a_file_runs_the_same_when_loaded(tmp_path: Path) -> None:
    model = made("cond in scan")
    graph = training_graph(model, lambda m, xs: m(xs), torch.optim.SGD(model.parameters(), lr=1e-2), sequences()[0])
    save_graph(graph, tmp_path / "graph")
    loaded = load_graph(tmp_path / "graph").with_(initial=graph.initial)
    for xs in sequences():
        assert torch.equal(Runner(graph).step(xs)["loss"], Runner(loaded).step(xs)["loss"])


def halve_until_small(x: Tensor) -> tuple[Tensor, Tensor]:
    """How often x must be halved until its sum is below one, and what is left; a loop of unknown length."""
    with torch.no_grad():
        count, left = while_loop(
            lambda n, y: y.abs().sum() > 1.0,
            lambda n, y: (n + 1, y / 2),
            (torch.zeros((), dtype=torch.int64), x.detach()),
        )
    return count, left


def test_a_while_loop_without_gradient_runs_as_long_as_the_values_say() -> None:
    make, step = training(lambda: nn.Linear(3, 3), lambda m, xs: (m(xs) * halve_until_small(xs)[0]).pow(2).mean())
    runner = match_eager(make, step, [torch.randn(4, 3, dtype=torch.float64) * scale for scale in (0.01, 1.0, 50.0)])
    assert "while_loop" in operators(runner.graph)


def test_a_while_loop_around_a_gradient_is_refused_with_the_way_out() -> None:
    def step(v: dict[str, Any], xs: Tensor) -> dict[str, Tensor]:
        count = torch.zeros((), dtype=torch.int64)
        _, y = while_loop(lambda n, y: n < 3, lambda n, y: (n + 1, v[""](y)), (count, xs))
        y.sum().backward()
        return {"loss": y.sum()}

    with pytest.raises(TraceError, match=r"test_control_flow.py:\d+ in step: .*length is known only(.|\n)*scan"):
        trace(step, {"": nn.Linear(3, 3)}, torch.randn(3))


# What the bodies may not do.


def refused(body: Callable[..., Any]) -> pytest.ExceptionInfo[TraceError]:
    with default_dtype(torch.float64), pytest.raises(TraceError) as caught:
        trace(lambda v, xs: {"loss": body(v, xs)}, {"m": nn.BatchNorm1d(3), "w": torch.ones(3)}, torch.randn(4, 3))
    assert f"{Path(__file__).name}:" in str(caught.value)
    return caught


def test_random_numbers_inside_a_body_are_refused() -> None:
    caught = refused(lambda v, xs: scan(lambda c, x: (c, F.dropout(x)), torch.zeros(3), xs)[1].sum())
    assert "Draw outside the body" in str(caught.value)


def test_changing_what_is_outside_of_a_body_is_refused() -> None:
    caught = refused(lambda v, xs: map_(lambda x: v["m"](x.expand(2, 3)).sum() + v["w"].add_(x).sum(), xs).sum())
    assert "from outside in place" in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda v, xs: scan(lambda c, x: (c.sum(), x), torch.zeros(3), xs)[0], "must keep its shape and dtype"),
        (lambda v, xs: scan(lambda c, x: ((c, c), x), torch.zeros(3), xs)[1], "must keep its structure"),
        (lambda v, xs: map_(lambda x: x[0] + x[1], (xs, xs[:2])), "the same for all of them"),
        (lambda v, xs: cond(xs.sum() > 0, lambda: (v["w"], v["w"]), lambda: v["w"])[0], "different structures"),
    ],
    ids=["shape", "structure", "lengths", "branches"],
)
def test_shapes_that_do_not_fit_are_refused(body: Callable[..., Any], message: str) -> None:
    assert message in str(refused(body).value)


def test_a_loop_over_nothing_is_refused() -> None:
    with pytest.raises(TraceError, match="at least 1 long"):
        scan(lambda c, x: (c, x), torch.zeros(3), torch.zeros(0, 3))


def test_the_documents_program_runs_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
    document = Path(__file__).parents[2] / "docs" / "control-flow.md"
    (program,) = re.findall(r"^```python\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    exec(compile(program, str(document), "exec"), {"__name__": "document"})
    first, last = map(float, capsys.readouterr().out.split(" -> "))
    assert last < first / 2
