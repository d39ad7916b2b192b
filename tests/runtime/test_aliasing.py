"""Memory that is shared with a variable: allowed where nothing is overwritten, copied or refused where something is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.small import cross_entropy, labelled, mlp
from torch import Tensor, nn

from millrace import Session, training_graph
from millrace.errors import FeedError, GraphError
from millrace.graph.trace import trace


def add(v: dict[str, Any], x: Tensor) -> Tensor:
    """Updates "a", reads the others."""
    v["a"] = v["a"] + x
    return sum((t.sum() for t in v.values()), x.sum())


def session_of(tensors: dict[str, Tensor], step: Any = add, copy: bool = False) -> Session:
    return Session(trace(step, tensors, torch.tensor(1.0)), compile="eager", copy=copy)


def test_two_variables_over_one_memory_are_refused_by_name() -> None:
    base = torch.zeros(4)
    with pytest.raises(GraphError, match=r"'a' and 'b' share memory.*Tie them as one tensor"):
        session_of({"a": base, "b": base[1:3]})
    with pytest.raises(GraphError, match="'a' and 'b' share memory"):
        session_of({"a": base, "b": base.view(2, 2).t()})
    with pytest.raises(GraphError, match="'a' and 'b' share memory"):
        session_of({"a": base, "b": base.view(torch.int32)})


def test_a_copying_session_gives_each_its_own() -> None:
    base = torch.zeros(4)
    session = session_of({"a": base, "b": base[1:3]}, copy=True)
    session.run("train", torch.tensor(1.0))
    assert session.read("a").tolist() == [1.0] * 4
    assert session.read("b").tolist() == [0.0] * 2


def test_parts_of_one_storage_that_do_not_meet_are_fine() -> None:
    """Fused weights, and the columns of a matrix."""
    base = torch.zeros(4, 4)
    session = session_of({"a": base[:, :2], "b": base[:, 2:], "c": torch.zeros(3), "d": torch.empty(0)})
    session.run("train", torch.tensor(1.0))
    assert base.sum(0).tolist() == [4.0, 4.0, 0.0, 0.0]


def test_shared_memory_that_nobody_writes_is_fine() -> None:
    base = torch.zeros(4)
    session = session_of({"a": torch.zeros(1), "b": base, "c": base[:2], "d": torch.ones(1).expand(3)})
    assert session.run(["train", "result"], torch.tensor(1.0))[1].item() == 5.0


def test_an_expanded_variable_cannot_be_updated() -> None:
    with pytest.raises(GraphError, match=r"'a'.*one place in memory.*\.clone\(\)"):
        session_of({"a": torch.zeros(1).expand(3)})


def test_a_tied_parameter_is_one_variable() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    graph = training_graph(model, cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1), labelled())
    session = Session(graph, compile="eager")
    assert "2.weight" not in session.variables
    session.run("train", labelled())
    assert model[2].weight is model[0].weight


@pytest.mark.parametrize("part", [lambda w: w, lambda w: w[:], lambda w: w.view(1, 3)[0]])
def test_a_batch_that_is_a_variable_is_read_before_it_changes(part: Any) -> None:
    def step(v: dict[str, Any], x: Tensor) -> Tensor:
        v["w"] = v["w"] * 2 + x
        v["u"] = v["u"] + x.sum()
        return v["w"].sum()

    session = Session(trace(step, {"w": torch.ones(3), "u": torch.zeros(1)}, torch.ones(3)), compile="eager")
    session.run("train", part(session.variables["w"]))
    assert session.read("w").tolist() == [3.0] * 3
    assert session.read("u").tolist() == [3.0]


def test_variables_of_another_shape_or_dtype_are_refused() -> None:
    model = mlp()
    graph = training_graph(model, cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1), labelled())
    with pytest.raises(FeedError, match=r"variable '2.bias' is f64\[3\] in the graph, got torch.float64 \[4\]"):
        Session(graph, {"2.bias": torch.zeros(4, dtype=torch.float64)})
    with pytest.raises(FeedError, match=r"'2.bias'.*torch.float32"):
        Session(graph, {"2.bias": torch.zeros(3)})
