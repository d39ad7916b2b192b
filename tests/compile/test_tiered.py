"""A runner starts eagerly, swaps once and says so; each piece of a step has a tier of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.compile.steps import BATCH, Said, close, fresh, nothing_compiles, run_steps, step_graph
from tests.small import cross_entropy, differing, labelled, mlp
from torch import Tensor

import millrace.compile.background as background
import millrace.compile.inductor as inductor
import millrace.compile.tiered as tiered
from millrace.compile.eager import Compiled, compile_eager
from millrace.compile.tiered import TIERS, Runner
from millrace.errors import CompileError, SettingError
from millrace.graph.graph import Graph
from millrace.graph.trace import trace
from millrace.graph.training import training_graph
from millrace.runtime.session import Session


def test_it_begins_eagerly_swaps_once_and_says_so_once(in_cache: Compiled) -> None:
    graph, said = step_graph(), Said()
    variables, twins = fresh(graph), fresh(graph)
    runner = Runner(graph, "tiered", said.append)
    first = run_steps(runner, variables, 1)
    assert (runner.tier, said) == ("eager", [])
    runner.wait()
    assert runner.tier == "eager"
    rest = run_steps(runner, variables, 4)
    assert runner.tier == "inductor"
    assert "swapped in at call 2" in said.only
    expected = compile_eager(graph)
    assert first + rest == pytest.approx(run_steps(expected, twins, 1) + run_steps(expected, twins, 4), rel=1e-4)
    assert close(variables, twins)


def test_a_step_that_runs_once_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiered, "BackgroundCompilation", nothing_compiles)
    run_steps(Runner(step_graph(), "tiered", Said().append), fresh(step_graph()), 1)
    with pytest.raises(AssertionError, match="something was compiled"):
        run_steps(Runner(step_graph(), "tiered", Said().append), fresh(step_graph()), 2)


def test_reading_a_variable_again_and_again_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiered, "BackgroundCompilation", nothing_compiles)
    monkeypatch.setattr(tiered, "compile_inductor", nothing_compiles)
    for compile in TIERS:
        session = Session(step_graph(), compile=compile, copy=True)
        for _ in range(4):
            assert session.run("3.bias").shape == (3,)


def test_an_unknown_tier_is_refused() -> None:
    with pytest.raises(SettingError, match="'fast': expected one of eager, inductor, tiered"):
        Runner(step_graph(), "fast", print)


def test_a_piece_that_fails_stays_eager_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_without_updates(graph: Graph) -> Compiled:
        if graph.updates:
            raise CompileError("Inductor failed: no kernel for an update")
        return compile_eager(graph)

    monkeypatch.setattr(tiered, "compile_inductor", only_without_updates)
    model, twin = mlp(), mlp()
    said = Said()
    graph = training_graph(model, cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1), labelled())
    session = Session(graph, compile="inductor", say=said.append)
    for _ in range(2):
        session.run("loss", labelled())
        session.run(["train", "loss"], labelled())
    assert session.tier("loss", labelled()) == "inductor"
    assert session.tier(["train", "loss"], labelled()) == "eager"
    assert sorted(line.split(":")[0].split(" ")[0] for line in said) == ["compiled", "staying"]
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(twin, labelled()).backward()
        optimizer.step()
    torch.testing.assert_close(dict(model.state_dict()), dict(twin.state_dict()), rtol=0, atol=1e-12)


@pytest.fixture
def own_operator() -> Any:
    @torch.library.custom_op("millrace_test::negative_square", mutates_args=())
    def negative_square(x: Tensor) -> Tensor:
        return -(x * x)

    @negative_square.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    return negative_square


@pytest.mark.usefixtures("in_cache")
def test_an_operator_of_this_process_alone_is_compiled_here(own_operator: Any) -> None:
    """The child does not know it; Inductor calls it as it is."""

    def step(v: dict[str, Any], x: Tensor) -> Tensor:
        v["w"] = own_operator(v["w"] + x)
        return v["w"].sum()

    said = Said()
    session = Session(trace(step, {"w": torch.ones(3)}, torch.ones(3)), compile="tiered", say=said.append)
    session.tier(["train", "result"], torch.ones(3), wait=True)
    assert session.run(["train", "result"], torch.ones(3))[1].item() == -12.0
    assert session.last_tier == "inductor", said
    assert session.run(["train", "result"], torch.ones(3))[1].item() == -27.0


def test_a_model_s_layout_is_the_batch_s_own_affair(in_cache: Compiled) -> None:
    """A batch that lies otherwise in memory than the first one is laid out as the compiled code expects it."""
    said = Said()
    session = Session(step_graph(), compile="inductor", copy=True, say=said.append)
    eager = Session(step_graph(), compile="eager", copy=True)
    fetches = ["train", "loss", "accuracy", "visible"]
    inputs, labels = BATCH
    for batch in (BATCH, (inputs.t().contiguous().t(), labels), (inputs[:1].expand(6, 4), labels[:1].expand(6))):
        found, expected = session.run(fetches, batch), eager.run(fetches, batch)
        assert found[1].item() == pytest.approx(expected[1].item(), rel=1e-4)
    assert session.last_tier == "inductor", said


def test_a_variable_that_is_assigned_is_what_the_compiled_step_reads(in_cache: Compiled) -> None:
    sessions = [Session(step_graph(), compile=tier, copy=True) for tier in ("inductor", "eager")]
    fetches = ["train", "loss", "accuracy", "visible"]
    for session in sessions:
        session.run(fetches, BATCH)
        for name, value in session.variables.items():
            if value.is_floating_point():
                session.assign(name, torch.zeros_like(value))
    losses = [session.run(fetches, BATCH)[1].item() for session in sessions]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(torch.log(torch.tensor(3.0)).item(), rel=1e-5)


def test_a_graph_that_no_file_can_hold_is_compiled_without_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def unnamed(*_: Any) -> Any:
        raise inductor.GraphError("a constant is sparse")

    monkeypatch.setattr(inductor, "artifact_path", unnamed)
    monkeypatch.setattr(inductor, "compile_module", lambda *_: compile_eager)
    assert callable(inductor.compile_inductor(step_graph()))
    assert inductor.load_cached(step_graph(), 1) is None


def test_autocast_around_a_run_changes_nothing() -> None:
    graph = step_graph()
    plain, inside = (Session(graph, compile="eager", copy=True) for _ in range(2))
    expected = plain.run(["train", "loss"], BATCH)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(inside.run(["train", "loss"], BATCH)[1], expected)
    assert differing(plain.variables, inside.variables) == []


def test_a_compiled_step_s_error_names_the_node(in_cache: Compiled) -> None:
    session = Session(step_graph(), compile="inductor", copy=True)
    fetches = ["train", "loss", "accuracy", "visible"]
    session.run(fetches, BATCH)
    assert session.last_tier == "inductor"
    with pytest.raises(Exception, match=r"out of (range|bounds)"):
        session.run(fetches, (BATCH[0], torch.full((6,), 99)))
    assert session.run(fetches, BATCH)[1].isfinite()


def test_background_knows_the_threads_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's number of threads is a thread's own: the compiling thread must see the run's."""
    model = torch.nn.Linear(200, 200)  # large enough to be worth dividing
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    graph = training_graph(model, lambda m, x: m(x).square().mean(), sgd, torch.randn(200, 200))
    seen: list[int] = []

    def look(_: Graph, threads: int) -> None:
        seen.append(threads)
        raise CompileError("enough")

    monkeypatch.setattr(background, "load_cached", look)
    torch.set_num_threads(2)
    try:
        background.BackgroundCompilation(graph).wait(60)
    finally:
        torch.set_num_threads(1)
    assert seen == [2]
