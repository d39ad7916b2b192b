"""The fast evaluator says what the simulator says."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.place import evaluate
from millrace.place.compiled import Compiled
from millrace.place.evaluate import Evaluator
from millrace.place.problem import Plan, Problem
from millrace.place.simulate import simulate
from millrace.place.tables import tables
from tests.place.brute import random_plan
from tests.place.problems import problems

SEEDS = st.integers(0, 2**32 - 1)


def _compare(problem: Problem, seed: int, moves: int = 12) -> None:
    random = np.random.default_rng(seed)
    plan = random_plan(problem, random)
    evaluator = Evaluator(problem)
    scores = [evaluator.reset(plan.device_G, plan.order_T)]
    expected = [simulate(problem, plan)]
    base = plan.device_G
    for _ in range(moves):
        moved = np.unique(random.integers(problem.groups, size=random.integers(1, 4)))
        device_G = base.copy()
        for group in moved:
            device_G[group] = random.choice(np.flatnonzero(tables(problem).allowed_GD[group]))
        scores.append(evaluator.trial(device_G, moved.tolist()))
        expected.append(simulate(problem, Plan(device_G, plan.order_T)))
        limit_s = scores[-1].step_s * random.uniform(0.5, 1.5)
        limited = evaluator.trial(device_G, moved.tolist(), limit_s)
        assert limited == scores[-1] or (limited.step_s == np.inf and scores[-1].step_s > limit_s)
        if random.random() < 0.4:
            scores.append(evaluator.accept(device_G, moved.tolist()))
            expected.append(expected[-1])
            base = device_G
    assert [s.step_s for s in scores] == [e.step_s for e in expected]
    assert [s.over_bytes for s in scores] == [e.over_bytes for e in expected]
    np.testing.assert_array_equal(evaluator.peak_bytes(), simulate(problem, evaluator.plan()).peak_bytes_D)


@given(problems(groups=8, tasks=40, devices=4), SEEDS)
@settings(max_examples=150, deadline=None)
def test_every_move_scores_as_the_simulator_says(problem: Problem, seed: int) -> None:
    _compare(problem, seed)


@given(problems(groups=8, tasks=40, devices=4, tight=True), SEEDS)
@settings(max_examples=150, deadline=None)
def test_what_memory_lacks_is_what_the_simulator_says(problem: Problem, seed: int) -> None:
    _compare(problem, seed)


@given(problems(groups=5, tasks=12, tight=True), SEEDS)
@settings(max_examples=25, deadline=None)
def test_it_is_as_right_without_numba(problem: Problem, seed: int) -> None:
    assert isinstance(evaluate.walk, Compiled)
    kept = evaluate.walk, evaluate.peak_bytes
    evaluate.walk, evaluate.peak_bytes = (function.function for function in kept)  # type: ignore[assignment]
    try:
        _compare(problem, seed, moves=4)
    finally:
        evaluate.walk, evaluate.peak_bytes = kept
