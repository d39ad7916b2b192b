"""The fast evaluator says what the simulator says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.place.brute import random_plan
from tests.place.problems import problems

from millrace.place import evaluate
from millrace.place.compiled import Compiled
from millrace.place.evaluate import Evaluator, least_seconds_after
from millrace.place.problem import Plan, Problem
from millrace.place.simulate import simulate
from millrace.place.tables import tables

SEEDS = st.integers(0, 2**32 - 1)


def _compare(problem: Problem, seed: int, moves: int = 12) -> None:
    random = np.random.default_rng(seed)
    plan = random_plan(problem, random)
    evaluator, device_G = Evaluator(problem), plan.device_G.copy()
    for _ in range(moves):
        score, simulated = evaluator.score(device_G, plan.order_T), simulate(problem, Plan(device_G, plan.order_T))
        assert (score.step_s, score.over_bytes) == (simulated.step_s, simulated.over_bytes)
        np.testing.assert_array_equal(evaluator.peak_bytes(device_G, plan.order_T), simulated.peak_bytes_D)
        group = random.integers(problem.groups)
        device_G[group] = random.choice(np.flatnonzero(tables(problem).allowed_GD[group]))


@pytest.mark.parametrize("tight", [False, True])
@given(data=st.data(), seed=SEEDS)
@settings(max_examples=100, deadline=None)
def test_every_move_scores_as_the_simulator_says(tight: bool, data: st.DataObject, seed: int) -> None:
    _compare(data.draw(problems(groups=8, tasks=40, devices=4, tight=tight)), seed)


@given(problems(groups=5, tasks=12, tight=True), SEEDS)
@settings(max_examples=25, deadline=None)
def test_it_is_as_right_without_numba(problem: Problem, seed: int) -> None:
    kept = evaluate.walk, evaluate.peak_bytes
    assert all(isinstance(function, Compiled) for function in kept)
    evaluate.walk, evaluate.peak_bytes = (function.function for function in kept)  # type: ignore[assignment]
    try:
        _compare(problem, seed, moves=4)
    finally:
        evaluate.walk, evaluate.peak_bytes = kept


@given(problems(groups=8, tasks=40), SEEDS)
@settings(max_examples=50, deadline=None)
def test_no_task_is_nearer_to_the_end_than_said(problem: Problem, seed: int) -> None:
    simulated = simulate(problem, random_plan(problem, np.random.default_rng(seed)))
    assert (simulated.end_s_T + least_seconds_after(problem) <= simulated.step_s * (1 + 1e-12)).all()
