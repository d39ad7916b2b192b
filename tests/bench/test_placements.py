"""The report on placements: a small case from its graph to the document, bounds, and what the document counts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.placements import __main__ as command
from bench.placements.bound import lower_bound_s
from bench.placements.graphs import WORKLOADS, Workload, build
from bench.placements.models import ExpertTransformer, Perceptron, Translator, TwoTowers
from bench.placements.report import counted, geometric_mean, slower_than_expert, speedup
from hypothesis import given, settings
from tests.place.problems import chain, problems

from millrace.errors import PlacementError
from millrace.place.algorithms.auto import auto
from millrace.place.cluster_file import read_cluster
from millrace.place.problem import Problem
from millrace.place.simulate import simulate

SMALL = Workload(
    "small",
    "a small perceptron",
    lambda: Perceptron(64, 256, 3, 10),
    lambda: (torch.zeros(32, 64), torch.zeros(32, dtype=torch.int64)),
    microbatches=2,
)


def test_a_case_is_planned_kept_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "WORKLOADS", {"small": SMALL})
    kept, report = tmp_path / "cases.json", tmp_path / "report.md"
    asked = ["--graphs", "small", "--clusters", "gpu-and-cpu", "--auto", "0.2", "--search", "0.1", "--exact", "0.1"]
    asked += ["--kept", str(kept), "--report", str(report)]
    assert command.main(asked) == 0
    case = json.loads(kept.read_text())["small / gpu-and-cpu"]
    assert case["unequal"]
    steps = {name: found["step_s"] for name, found in case["algorithms"].items()}
    assert steps["auto"] <= min(steps.values()) * 1.01
    assert case["bound_s"] <= steps["auto"]
    assert case["exact"]["bound_s"] <= case["exact"]["exact_s"] * (1 + 1e-5)
    assert "small / gpu-and-cpu *" in report.read_text()

    def planned_again(*_: Any) -> None:
        raise AssertionError("what is kept is not planned again")

    monkeypatch.setattr(command, "plan_graph", planned_again)
    assert command.main(asked) == 0
    with pytest.raises(AssertionError, match="planned again"):
        command.main([*asked, "--auto", "0.3"])


@given(problems(groups=6, tasks=20, tight=True))
@settings(max_examples=20, deadline=None)
def test_no_plan_beats_the_bound(problem: Problem) -> None:
    try:
        plan = auto(problem, budget_s=0.05, seed=0)
    except PlacementError:
        return
    assert lower_bound_s(problem) <= simulate(problem, plan).step_s * (1 + 1e-9)


def test_the_bound_is_reached_by_one_device_alone() -> None:
    problem = chain(4, 1, (1e13,), memory=[64e9])
    assert lower_bound_s(problem) == pytest.approx(simulate(problem, auto(problem, budget_s=0.1, seed=0)).step_s)


def test_a_slower_plan_is_told() -> None:
    cases = [_case("one", 1.0, 0.5), _case("two", 1.0, 1.1), _case("three", None, 1.0), _case("four", 1.0, None)]
    assert slower_than_expert(cases) == ["two", "four"]
    assert [speedup(case, "auto") for case in cases[::2]] == [2.0, None]
    assert [case["name"] for case in counted([*cases, {**cases[0], "unequal": False}])] == [c["name"] for c in cases]
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert math.isnan(geometric_mean([]))


def test_every_cluster_can_be_read_and_one_holds_what_a_gpu_does_not() -> None:
    clusters = {path.stem: read_cluster(path) for path in command.CLUSTERS.glob("*.toml")}
    assert {name: len(c.devices) for name, c in clusters.items()} == {
        "four-fast-links": 4,
        "four-slow-links": 4,
        "two-fast-two-slow": 4,
        "gpu-and-cpu": 2,
    }
    gpu, cpu = clusters["gpu-and-cpu"].devices
    assert cpu.memory_bytes > 10 * gpu.memory_bytes
    assert len(WORKLOADS) == 8


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        (lambda: Translator(20, 2, 8), ((4, 3), (4, 3), (4, 3))),
        (lambda: TwoTowers(30, 20, 2, 8, 4), ((4, 2), (4, 2), (4,))),
        (lambda: ExpertTransformer(20, 1, 8, 2, 2), ((4, 6), (4, 6))),
    ],
)
def test_models_are_traced_without_data(model: Any, shapes: tuple[tuple[int, ...], ...]) -> None:
    batch = lambda: tuple(torch.zeros(shape, dtype=torch.int64) for shape in shapes)  # noqa: E731
    graph = build(Workload("small", "", model, batch, microbatches=1, optimizer=torch.optim.SGD))
    assert {feed.spec.shape for feed in graph.feeds} == set(shapes)
    assert all(tensor.device.type == "meta" for tensor in graph.initial.values())


def _case(name: str, expert_s: float | None, auto_s: float | None) -> dict[str, Any]:
    steps = {"expert": {"step_s": expert_s}, "auto": {"step_s": auto_s}}
    return {"name": name, "algorithms": steps, "unequal": True, "branchy": False}
