"""Annealing of placements keeps its books right, and finds what a kept order hides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.place.brute import random_plan
from tests.place.problems import chain, problems

from millrace.place.algorithms.local_search import improve, problem_arrays
from millrace.place.anneal_placements import anneal_placements
from millrace.place.evaluate import least_seconds_after
from millrace.place.list_schedule import list_schedule
from millrace.place.order import list_order, open_microbatches, priorities
from millrace.place.problem import Ints, Plan, Problem
from millrace.place.simulate import simulate
from millrace.place.tables import FORWARD, tables

SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("tight", [False, True])
@given(data=st.data(), seed=SEEDS, way=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_what_it_returns_can_run_and_scores_as_the_simulator_says(
    tight: bool, data: st.DataObject, seed: int, way: int
) -> None:
    problem = data.draw(problems(groups=8, tasks=30, tight=tight))
    best, ended_G, said = _anneal(problem, seed, way)
    simulated = simulate(problem, best)
    assert (simulated.step_s, simulated.over_bytes) == pytest.approx(said, rel=1e-9)
    assert tables(problem).allowed_GD[np.arange(problem.groups), ended_G].all()


@given(problems(groups=6, tasks=24), SEEDS, st.floats(0.5, 1.5))
@settings(max_examples=60, deadline=None)
def test_a_schedule_is_given_up_only_when_it_takes_longer(problem: Problem, seed: int, share: float) -> None:
    device_G = random_plan(problem, np.random.default_rng(seed)).device_G
    whole = _schedule(problem, device_G, np.inf)
    limited = _schedule(problem, device_G, share * whole[1].max())
    if share >= 1:
        np.testing.assert_array_equal(limited[0], whole[0])
        np.testing.assert_array_equal(limited[1], whole[1])
    else:
        assert limited[1][-1] == np.inf


def test_stages_of_a_pipeline_move_with_their_order() -> None:
    problem = chain(12, 8, (2e13, 2e13, 5e12, 5e12))
    device_G = np.repeat([0, 1], 6)
    start = Plan(device_G, list_order(problem, device_G))
    found = improve(problem, [start], 1.0, 0)
    assert found.score.step_s < simulate(problem, start).step_s / 1.05
    assert set(found.device_G.tolist()) > {0, 1}  # the slow devices help, in an order of their own


def _anneal(problem: Problem, seed: int, way: int) -> tuple[Plan, Ints, tuple[float, float]]:
    """The best plan, the last placement, and what the best is said to come to."""
    random = np.random.default_rng(seed)
    start = random_plan(problem, random)
    movable = np.flatnonzero(tables(problem).allowed_GD.sum(axis=1) > 1).tolist()
    ways = priorities(problem, start.device_G)
    rank_T, extra = ways[way % len(ways)]
    device_G, best_G, best_T = start.device_G.copy(), start.device_G.copy(), start.order_T.copy()
    unit_s = simulate(problem, start).step_s
    step_s, over = anneal_placements(
        random.random((200, 5)),
        0.1 * unit_s,
        0.001 * unit_s,
        0.001,
        extra,
        rank_T,
        tables(problem).phase_T == FORWARD,
        open_microbatches(problem),
        device_G,
        best_G,
        best_T,
        *problem_arrays(problem, movable),
    )
    return Plan(best_G, best_T), device_G, (step_s, over)


def _schedule(problem: Problem, device_G: Ints, limit_s: float) -> tuple[Ints, np.ndarray]:
    made = tables(problem)
    load_D = np.zeros(problem.devices)
    np.add.at(load_D, device_G, made.seconds_GD[np.arange(problem.groups), device_G])
    order, ends = list_schedule(
        limit_s,
        least_seconds_after(problem),
        load_D,
        priorities(problem, device_G)[0][0],
        made.phase_T == FORWARD,
        open_microbatches(problem),
        np.full(problem.devices, np.iinfo(np.int64).max),
        device_G[problem.group_T],
        problem.seconds_TD,
        made.first_made_T1,
        made.made_K,
        problem.wire_bytes_K,
        problem.first_use_K1,
        problem.uses_C,
        np.diff(made.first_read_T1),
        problem.latency_s_DD,
        problem.bytes_per_s_DD,
        problem.wire_DD,
    )
    return order, ends
