"""One graph on one cluster: what every algorithm finds, judged by the simulator."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.placements.bound import lower_bound_s
from millrace.errors import PlacementError
from millrace.graph.graph import Graph
from millrace.place.cluster import Cluster
from millrace.place.demands import Demands
from millrace.place.evaluate import Evaluator
from millrace.place.hints import Hints
from millrace.place.memory import lacks_fast_memory
from millrace.place.order import gpipe_order, one_forward_one_backward_order
from millrace.place.prepare import Prepared, best_plan, prepare
from millrace.place.problem import Plan, Problem
from millrace.place.simulate import simulate
from millrace.place.tables import tables
from millrace.place.wire import Wire

QUICK = ("expert", "hints_only", "round_robin", "heft", "pipeline", "interleaved")
LEARNING = ("local_search", "policy_gradient")  # both are given the same time
_BUDGET_OF_QUICK_S = 2.0


@dataclass(frozen=True)
class Settings:
    """How long `auto` and the two learning algorithms may search, in seconds; groups: how many there may be."""

    auto_s: float = 12.0
    search_s: float = 6.0
    groups: int = 40
    seed: int = 0


@dataclass(frozen=True)
class ExactSettings:
    """How long the integer program, and `auto` beside it, may search, in seconds, and in how many groups."""

    search_s: float = 8.0
    groups: int = 16
    seed: int = 0


def run_case(graph: Graph, cluster: Cluster, settings: Settings) -> dict[str, Any]:
    """Every algorithm but the exact one on a graph in microbatches."""
    begun = time.perf_counter()
    demands = Demands(graph, Hints.of(None))
    ways = [prepare(graph, cluster, demands, Wire.of(None), limit=settings.groups)]
    if lacks_fast_memory(ways[0].problem):
        ways.append(prepare(graph, cluster, demands, Wire.of(None), limit=settings.groups, states_apart=True))
    problem = ways[0].problem
    prepare_s = time.perf_counter() - begun
    budgets = dict.fromkeys(QUICK, _BUDGET_OF_QUICK_S) | dict.fromkeys(LEARNING, settings.search_s)
    found = {name: attempt(ways[:1], name, budget_s, settings.seed) for name, budget_s in budgets.items()}
    found["auto"] = attempt(ways, "auto", settings.auto_s, settings.seed)  # as `place` does
    return {
        "settings": asdict(settings),
        "groups": problem.groups,
        "tasks": problem.tasks,
        "tensors": len(problem.producer_K),
        "prepare_s": prepare_s,
        "bound_s": min(lower_bound_s(way.problem) for way in ways),
        "algorithms": {name: result for name, (result, _) in found.items()},
        "orders": orders_of(problem, found["pipeline"][1] or found["expert"][1]),
    }


def attempt(ways: Sequence[Prepared], name: str, budget_s: float, seed: int) -> tuple[dict[str, Any], Plan | None]:
    """What one algorithm finds: the step it comes to, or none where nothing that fits is found."""
    begun = time.perf_counter()
    try:
        way, plan = best_plan(ways, name, budget_s=budget_s, seed=seed)
    except PlacementError as error:
        taken_s = time.perf_counter() - begun
        return {"step_s": None, "planning_s": taken_s, "fits": False, "note": str(error).partition(": ")[0]}, None
    taken_s = time.perf_counter() - begun
    simulated = simulate(way.problem, plan)
    tried = re.search(r"\((\d+) trials\)|^.*?(\d+) trials|best of (\d+) placements", plan.note)
    result = {
        "step_s": simulated.step_s,
        "planning_s": taken_s,
        "fits": simulated.fits,
        "states_apart": way.states_apart,
        "tried": int(next(n for n in tried.groups() if n)) if tried else None,
        "note": plan.note,
    }
    return result, plan


def orders_of(problem: Problem, plan: Plan | None) -> dict[str, Any] | None:
    """One placement in the two classical orders of microbatches: seconds, and the most memory of a device."""
    if plan is None or tables(problem).microbatches == 1:
        return None
    evaluator, result = Evaluator(problem), {}
    orders = {"gpipe": gpipe_order, "1f1b": one_forward_one_backward_order}
    for name, make in orders.items():
        order_T = make(problem, plan.device_G)
        score = evaluator.score(plan.device_G, order_T)
        peak_bytes = float(evaluator.peak_bytes(plan.device_G, order_T).max())
        result[name] = {"step_s": score.step_s, "fits": score.over_bytes == 0, "peak_bytes": peak_bytes}
    return result


def compare_exact(graph: Graph, cluster: Cluster, settings: ExactSettings) -> dict[str, Any]:
    """The integer program, and `auto` in the same time, on the step of one microbatch."""
    ways = [prepare(graph, cluster, Demands(graph, Hints.of(None)), Wire.of(None), limit=settings.groups)]
    problem = ways[0].problem
    exact = attempt(ways, "exact", settings.search_s, settings.seed)[0]
    auto = attempt(ways, "auto", settings.search_s, settings.seed)[0]
    bound = re.search(r"no plan takes less than ([\d.e+-]+) ms", exact["note"])
    return {
        "settings": asdict(settings),
        "groups": problem.groups,
        "tasks": problem.tasks,
        "auto_s": auto["step_s"],
        "exact_s": exact["step_s"],
        "bound_s": float(bound.group(1)) / 1e3 if bound else None,
        "proved": "proved to be the best" in exact["note"],
        "note": exact["note"],
    }
