"""Slow and plain counterparts to compare with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from millrace.place.problem import Floats, Ints, Plan, Problem
from millrace.place.simulate import Simulated, simulate


def memory_over_time(problem: Problem, plan: Plan, simulated: Simulated) -> Floats:
    """The peak of each device, from the lifetimes of tensors as `Problem` states them, looked at at every moment."""
    device_T = plan.device_G[problem.group_T]
    spans: list[tuple[int, float, float, float]] = []
    arrivals = {(t.tensor, t.target): t.end_s for t in simulated.transfers}
    for tensor, producer in enumerate(problem.producer_K):
        uses = problem.uses_C[problem.first_use_K1[tensor] : problem.first_use_K1[tensor + 1]]
        for device in range(problem.devices):
            ends = [simulated.end_s_T[t] for t in uses if device_T[t] == device]
            if device == device_T[producer]:
                begin, ends = simulated.start_s_T[producer], [*ends, simulated.end_s_T[producer]]
            elif ends:
                begin = arrivals[tensor, device]
            else:
                continue
            spans.append((device, float(begin), float(max(ends)), float(problem.bytes_K[tensor])))
    for task in range(problem.tasks):
        start, end = float(simulated.start_s_T[task]), float(simulated.end_s_T[task])
        spans.append((int(device_T[task]), start, end, float(problem.scratch_bytes_T[task])))
    peak_D = np.zeros(problem.devices)
    for device in range(problem.devices):
        resident = problem.resident_bytes_G[plan.device_G == device].sum()
        own = [s for s in spans if s[0] == device]
        moments = [s[1] for s in own]
        held = [sum(size for _, begin, end, size in own if begin <= now < end) for now in moments]
        peak_D[device] = resident + max(held, default=0.0)
    return peak_D


def placements(problem: Problem) -> Iterator[Ints]:
    """All of them."""
    for devices in itertools.product(range(problem.devices), repeat=problem.groups):
        if np.isfinite(problem.seconds_TD[np.arange(problem.tasks), np.array(devices)[problem.group_T]]).all():
            yield np.array(devices)


def topological_orders(problem: Problem) -> Iterator[Ints]:
    """All orders of the tasks."""
    before: list[set[int]] = [set() for _ in range(problem.tasks)]
    for tensor, producer in enumerate(problem.producer_K):
        for use in problem.uses_C[problem.first_use_K1[tensor] : problem.first_use_K1[tensor + 1]]:
            before[use].add(int(producer))

    def go_on(done: list[int]) -> Iterator[list[int]]:
        if len(done) == problem.tasks:
            yield done
        for task in range(problem.tasks):
            if task not in done and before[task] <= set(done):
                yield from go_on([*done, task])

    for order in go_on([]):
        yield np.array(order)


def best_step_seconds(problem: Problem, orders: list[Ints]) -> float:
    """The least time of any placement that fits, in any of these orders."""
    best = np.inf
    for device_G in placements(problem):
        for order_T in orders:
            simulated = simulate(problem, Plan(device_G, order_T))
            if simulated.fits:
                best = min(best, simulated.step_s)
    return best


def random_plan(problem: Problem, random: np.random.Generator) -> Plan:
    """Any placement where every group may run, and the tasks in any order that keeps to what they read."""
    finite_TD = np.isfinite(problem.seconds_TD)
    device_G = np.array(
        [random.choice(np.flatnonzero(finite_TD[problem.group_T == g].all(axis=0))) for g in range(problem.groups)]
    )
    made: list[set[int]] = [set() for _ in range(problem.tasks)]
    for tensor, producer in enumerate(problem.producer_K):
        for use in problem.uses_C[problem.first_use_K1[tensor] : problem.first_use_K1[tensor + 1]]:
            made[use].add(int(producer))
    order: list[int] = []
    while len(order) < problem.tasks:
        ready = [t for t in range(problem.tasks) if t not in order and made[t] <= set(order)]
        order.append(int(random.choice(ready)))
    return Plan(device_G, np.array(order))
