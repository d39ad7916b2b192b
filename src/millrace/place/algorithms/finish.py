"""From a placement of groups to a plan that can run."""

from __future__ import annotations

import dataclasses

from millrace.place.evaluate import Evaluator
from millrace.place.memory import does_not_fit
from millrace.place.order import best_order
from millrace.place.problem import Ints, Plan, Problem
from millrace.place.simulate import simulate


def finish(problem: Problem, device_G: Ints, algorithm: str, note: str) -> Plan:
    """The placement in its best order. Raises: PlacementError when it does not fit into memory."""
    return checked(problem, Plan(device_G, best_order(problem, device_G), algorithm, note))


def checked(problem: Problem, plan: Plan) -> Plan:
    """The plan itself, its time at the head of its note. Raises: PlacementError when it does not fit into memory."""
    simulated = simulate(problem, plan)
    if not simulated.fits:
        raise does_not_fit(problem, simulated.peak_bytes_D, plan.algorithm)
    return dataclasses.replace(plan, note=f"{1e3 * simulated.step_s:.4g} ms a step; {plan.note}")


def step_seconds(problem: Problem, plan: Plan) -> float:
    """What a plan takes, in seconds; infinite where it does not fit."""
    score = Evaluator(problem).score(plan.device_G, plan.order_T)
    return score.step_s if score.over_bytes == 0 else float("inf")
