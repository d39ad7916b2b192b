"""The best of all: quick algorithms first, then a search from what they found."""

from __future__ import annotations

import time

from millrace.errors import PlacementError
from millrace.place.algorithms.base import Algorithm
from millrace.place.algorithms.expert import expert
from millrace.place.algorithms.finish import checked, step_seconds
from millrace.place.algorithms.heft import heft
from millrace.place.algorithms.hints_only import hints_only
from millrace.place.algorithms.interleaved import interleaved
from millrace.place.algorithms.local_search import improve
from millrace.place.algorithms.pipeline import pipeline
from millrace.place.algorithms.round_robin import round_robin
from millrace.place.memory import does_not_fit
from millrace.place.problem import Plan, Problem
from millrace.place.simulate import simulate

_QUICK: tuple[tuple[str, Algorithm], ...] = (
    ("expert", expert),
    ("hints_only", hints_only),
    ("pipeline", pipeline),
    ("interleaved", interleaved),
    ("heft", heft),
    ("round_robin", round_robin),
)


def auto(problem: Problem, *, budget_s: float, seed: int) -> Plan:
    """Run the quick algorithms, then anneal from the best of them in what is left of the time.

    Returns: the fastest plan that fits, never slower than any of them; its note has the time of each.
    Raises: PlacementError when nothing that fits is found.
    """
    deadline = time.monotonic() + budget_s
    plans: list[Plan] = []
    refusals: list[str] = []
    for name, algorithm in _QUICK:
        try:
            plans.append(algorithm(problem, budget_s=budget_s / 10, seed=seed))
        except PlacementError:
            refusals.append(f"{name}: none that fits")
    times_s = [step_seconds(problem, plan) for plan in plans]
    ranking = sorted(range(len(plans)), key=lambda i: (times_s[i], i))
    found = improve(problem, [plans[i] for i in ranking], max(deadline - time.monotonic(), budget_s / 2), seed)
    searched = Plan(found.device_G, found.order_T, "auto")
    table = [f"{plans[i].algorithm}: {1e3 * times_s[i]:.4g} ms" for i in ranking] + refusals
    if found.score.over_bytes > 0:
        raise does_not_fit(problem, simulate(problem, searched).peak_bytes_D, "auto")
    gained = not plans or found.score.step_s < times_s[ranking[0]]
    winner = "local_search" if gained else plans[ranking[0]].algorithm
    if gained:
        table.insert(0, f"local_search: {1e3 * found.score.step_s:.4g} ms ({found.trials} trials)")
    note = f"{winner} was fastest; " + ", ".join(table)
    return checked(problem, Plan(found.device_G, found.order_T, "auto", note))
