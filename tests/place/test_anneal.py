"""Annealing keeps its books right."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.place.brute import random_plan
from tests.place.problems import branchy, problems

from millrace.place import anneal as module
from millrace.place.algorithms import local_search
from millrace.place.algorithms.local_search import improve
from millrace.place.compiled import Compiled
from millrace.place.problem import Plan, Problem
from millrace.place.simulate import simulate
from millrace.place.tables import tables

SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("tight", [False, True])
@given(data=st.data(), seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_what_it_returns_can_run_and_scores_as_the_simulator_says(tight: bool, data: st.DataObject, seed: int) -> None:
    problem = data.draw(problems(groups=8, tasks=30, tight=tight))
    best, ended, plan = _anneal(problem, seed, 0.1)
    simulated = simulate(problem, best)
    assert (simulated.step_s, simulated.over_bytes) == plan
    assert np.isfinite(simulate(problem, ended).step_s)  # it moved nothing to where it may not run


@given(problems(groups=8, tasks=30), SEEDS)
@settings(max_examples=60, deadline=None)
def test_without_heat_it_never_gets_worse(problem: Problem, seed: int) -> None:
    best, ended, _ = _anneal(problem, seed, 1e-12)
    start = simulate(problem, random_plan(problem, np.random.default_rng(seed)))
    assert simulate(problem, ended).step_s <= start.step_s * (1 + 1e-9)
    assert simulate(problem, best).step_s <= simulate(problem, ended).step_s * (1 + 1e-9)


@given(problems(groups=5, tasks=12, tight=True), SEEDS)
@settings(max_examples=10, deadline=None)
def test_it_does_the_same_without_numba(problem: Problem, seed: int) -> None:
    compiled = _anneal(problem, seed, 0.1, trials=40)
    names = [name for name, value in vars(module).items() if isinstance(value, Compiled)]
    kept = {name: getattr(module, name) for name in names}
    for name in names:
        setattr(module, name, kept[name].function)
    try:
        plain = _anneal(problem, seed, 0.1, trials=40)
    finally:
        for name in names:
            setattr(module, name, kept[name])
    assert plain[2] == compiled[2]
    np.testing.assert_array_equal(plain[0].device_G, compiled[0].device_G)
    np.testing.assert_array_equal(plain[1].order_T, compiled[1].order_T)


@given(problems(groups=6, tasks=20), SEEDS)
@settings(max_examples=8, deadline=None)
def test_a_search_is_never_worse_than_its_start(problem: Problem, seed: int) -> None:
    start = random_plan(problem, np.random.default_rng(seed))
    assert improve(problem, [start], 0.01, 1).score.step_s <= simulate(problem, start).step_s


def test_the_same_seed_finds_the_same() -> None:
    problem = branchy(2, 1, 1, rates=(2e13, 5e12))
    one, other = (improve(problem, [], 60.0, 1) for _ in range(2))
    np.testing.assert_array_equal(one.device_G, other.device_G)
    np.testing.assert_array_equal(one.order_T, other.order_T)
    assert one.trials == other.trials


def _anneal(problem: Problem, seed: int, hot: float, trials: int = 400) -> tuple[Plan, Plan, tuple[float, float]]:
    """The best plan, the last one, and what the best is said to come to."""
    random = np.random.default_rng(seed)
    start = random_plan(problem, random)
    movable = np.flatnonzero(tables(problem).allowed_GD.sum(axis=1) > 1).tolist()
    device_G, order_T = start.device_G.copy(), start.order_T.copy()
    best_G, best_T = device_G.copy(), order_T.copy()
    unit_s = simulate(problem, start).step_s
    step_s, over = module.anneal(
        random.random((trials, 5)),
        hot * unit_s,
        hot * unit_s / 100,
        0.001,
        0.3 if movable else 1.0,
        device_G,
        order_T,
        best_G,
        best_T,
        *local_search.problem_arrays(problem, movable),
    )
    return Plan(best_G, best_T), Plan(device_G, order_T), (step_s, over)
