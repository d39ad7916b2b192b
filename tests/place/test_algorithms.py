"""What every placement algorithm promises, and what some promise besides."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.place.brute import best_step_seconds, topological_orders
from tests.place.problems import Builder, big_embedding, branchy, chain, problems, step_of

from millrace.errors import PlacementError
from millrace.place.algorithms.auto import auto
from millrace.place.algorithms.exact import exact
from millrace.place.algorithms.exact_model import ExactModel
from millrace.place.algorithms.expert import expert
from millrace.place.algorithms.hints_only import hints_only
from millrace.place.algorithms.pipeline import best_ranges, chain_of, pipeline
from millrace.place.algorithms.registry import ALGORITHMS, algorithm
from millrace.place.algorithms.round_robin import round_robin
from millrace.place.problem import Problem
from millrace.place.simulate import simulate
from millrace.place.tables import tables

QUICK = ["expert", "heft", "hints_only", "interleaved", "pipeline", "round_robin"]
SLOW = ["auto", "exact", "local_search", "policy_gradient"]


def _check(problem: Problem, name: str, budget_s: float) -> None:
    try:
        plan = algorithm(name)(problem, budget_s=budget_s, seed=0)
    except PlacementError:
        return
    simulated = simulate(problem, plan)
    assert np.isfinite(simulated.step_s)
    assert simulated.fits
    assert plan.algorithm == name
    assert plan.note


@pytest.mark.parametrize("name", QUICK)
@given(problem=problems(groups=8, tasks=24, tight=True))
@settings(max_examples=30, deadline=None)
def test_plans_fit_and_run_where_they_may(name: str, problem: Problem) -> None:
    _check(problem, name, 1.0)


@pytest.mark.long
@pytest.mark.parametrize("name", SLOW)
@given(problem=problems(groups=5, tasks=12, tight=True))
@settings(max_examples=6, deadline=None)
def test_searched_plans_fit_and_run_where_they_may(name: str, problem: Problem) -> None:
    _check(problem, name, 0.05)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.long] if n in ("auto", "exact") else []) for n in sorted(ALGORITHMS)],
)
def test_every_algorithm_places_a_plain_model(name: str) -> None:
    problem = step_of([[], [0], [1]], [1e10] * 3, [1e6] * 3, [1e13] * 2, [1e9] * 2)
    plan = algorithm(name)(problem, budget_s=0.2, seed=0)
    assert simulate(problem, plan).fits


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_algorithm_refuses_what_cannot_fit(name: str) -> None:
    problem = step_of([[], [0], [1]], [1e10] * 3, [1e6] * 3, [1e13] * 2, [1e9] * 2, resident=[3e9, 3e9, 5e9])
    with pytest.raises(PlacementError, match="exceed all memory by 9 GB"):
        algorithm(name)(problem, budget_s=0.1, seed=0)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_a_group_that_may_run_nowhere_is_named(name: str) -> None:
    problem = step_of([[], [0]], [1e10] * 2, [1e6] * 2, [1e13] * 2, [1e9] * 2, allowed={1: []})
    with pytest.raises(PlacementError, match="the group g1 may run on none of"):
        algorithm(name)(problem, budget_s=0.1, seed=0)


def test_an_unknown_algorithm_is_answered_with_the_nearest() -> None:
    with pytest.raises(PlacementError, match="'pipeline'"):
        algorithm("pipelines")


@given(problems(groups=6, tasks=20))
@settings(max_examples=12, deadline=None)
def test_auto_is_never_slower_than_any_other(problem: Problem) -> None:
    # Long enough for the pipeline within it to look at all orders of devices, as the one below does.
    best_s = simulate(problem, auto(problem, budget_s=0.8, seed=0)).step_s
    for name in QUICK:
        try:
            plan = algorithm(name)(problem, budget_s=1.0, seed=0)
        except PlacementError:
            continue
        assert best_s <= simulate(problem, plan).step_s * (1 + 1e-9)


@given(problems(groups=4, tasks=6, devices=2, tight=True))
@settings(max_examples=25, deadline=None)
def test_exact_is_the_best_of_all_plans(problem: Problem) -> None:
    orders = list(itertools.islice(topological_orders(problem), 200))
    if len(orders) == 200 or len(np.unique(problem.microbatch_T)) > 1:
        problem.microbatch_T[:] = 0
    best_s = best_step_seconds(problem, orders)
    if not np.isfinite(best_s):
        with pytest.raises(PlacementError):
            exact(problem, budget_s=1.0, seed=0)
        return
    plan = exact(problem, budget_s=1.0, seed=0)
    step_s = simulate(problem, plan).step_s
    if "proved" in plan.note:
        assert step_s <= best_s * (1 + 2e-5)
    bound_s = float(plan.note.split("less than ")[1].split(" ms")[0]) / 1e3
    assert bound_s <= best_s * (1 + 1e-3)  # four digits are printed


@given(problems(groups=4, tasks=6, devices=2), st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_integer_program_bounds_the_best_and_reaches_it_where_wires_are_fast(problem: Problem, fast: bool) -> None:
    apart = ~np.eye(problem.devices, dtype=bool)
    if fast:
        problem.latency_s_DD[apart], problem.bytes_per_s_DD[apart] = 1e-9, 1e12
    best_s = best_step_seconds(problem, list(topological_orders(problem)))
    model = ExactModel(problem, 2 * best_s)
    for one, other in itertools.combinations(range(problem.tasks), 2):
        model.separate(one, other)
    readers = [problem.group_T[problem.uses_C[first:last]] for first, last in itertools.pairwise(problem.first_use_K1)]
    for one, other in itertools.combinations([k for k, groups in enumerate(readers) if len(groups)], 2):
        if problem.devices > 1 and not fast:
            model.separate_transfers((one, int(readers[one][0])), (other, int(readers[other][-1])))
    bound_s, _, _ = model.solve(5.0)
    assert bound_s <= best_s * (1 + 1e-5)
    if fast:
        assert bound_s == pytest.approx(best_s, rel=1e-3)


def test_exact_proves_what_it_finds() -> None:
    plan = exact(branchy(3, 2, 1), budget_s=10.0, seed=0)
    assert "proved to be the best" in plan.note


def test_exact_refuses_what_is_too_large() -> None:
    with pytest.raises(PlacementError, match="up to 40 groups"):
        exact(chain(8, 2), budget_s=1.0, seed=0)


@given(st.integers(2, 7), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_pipeline_divides_a_chain_best(groups: int, microbatches: int, devices: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    devices = min(devices, groups)
    problem = step_of(
        [[g - 1] if g else [] for g in range(groups)],
        random.uniform(1e9, 1e11, groups).tolist(),
        random.integers(1e6, 1e8, groups).astype(float).tolist(),
        random.uniform(1e12, 1e13, devices).tolist(),
        [1e12] * devices,
        microbatches=microbatches,
    )
    chained = chain_of(problem, np.full(groups, -1))
    value, places = best_ranges(problem, chained, tuple(range(devices)))
    seconds_GD = tables(problem).seconds_GD
    least = np.inf
    for cuts in itertools.combinations(range(1, groups), devices - 1):
        ends = [0, *cuts, groups]
        stages = [seconds_GD[a:b, d].sum() for d, (a, b) in enumerate(itertools.pairwise(ends))]
        there = [chained.forward_tensors_N[c] * 1e-5 + chained.forward_bytes_N[c] / 1e10 for c in cuts]
        back = [chained.backward_tensors_N[c] * 1e-5 + chained.backward_bytes_N[c] / 1e10 for c in cuts]
        total = sum(stages) + sum(there) + sum(back)
        least = min(least, (total + (microbatches - 1) * max([*stages, *there, *back])) / microbatches)
    assert value == pytest.approx(least)
    assert len(places) == devices + 1


def test_the_formula_of_the_pipeline_is_the_simulated_time_of_a_chain() -> None:
    problem = chain(6, 1, (1e13, 1e13))
    chained = chain_of(problem, np.full(6, -1))
    value, places = best_ranges(problem, chained, (0, 1))
    plan = pipeline(problem, budget_s=1.0, seed=0)
    assert simulate(problem, plan).step_s <= value
    assert places[0] == 0
    assert places[-1] == 6


def test_expert_puts_a_table_that_fits_nowhere_else_on_the_host() -> None:
    plan = expert(big_embedding(), budget_s=1.0, seed=0)
    assert plan.device_G.tolist() == [1, 0, 0, 0, 0, 0]


def test_expert_leaves_slow_devices_out_unless_memory_asks_for_them() -> None:
    rates = (2e13, 2e13, 1e12)
    roomy, full = chain(6, 4, rates), chain(6, 4, rates, memory=[3.5e8] * 3)
    assert set(expert(roomy, budget_s=1.0, seed=0).device_G.tolist()) == {0, 1}
    assert set(expert(full, budget_s=1.0, seed=0).device_G.tolist()) == {0, 1, 2}


def test_expert_shares_by_speed_where_slower_devices_help() -> None:
    plan = expert(chain(20, 16, (2e13, 1e13)), budget_s=1.0, seed=0)
    assert np.bincount(plan.device_G).tolist() == [13, 7]


def test_interleaved_waits_less_than_one_range_a_device() -> None:
    problem = chain(16, 4, bytes_per_s=1e11)
    one, several = pipeline(problem, budget_s=1.0, seed=0), algorithm("interleaved")(problem, budget_s=1.0, seed=0)
    assert (np.diff(several.device_G) != 0).sum() > 3  # every device more than once
    assert simulate(problem, several).step_s < simulate(problem, one).step_s / 1.1


def test_hints_only_puts_the_rest_on_the_fastest_device() -> None:
    problem = step_of([[], [0], [1]], [1e10] * 3, [1e6] * 3, [1e12, 1e13], [1e9] * 2, allowed={1: [0]})
    assert hints_only(problem, budget_s=1.0, seed=0).device_G.tolist() == [1, 0, 1]


def test_round_robin_passes_full_devices() -> None:
    problem = step_of(
        [[], [0], [1], [2]], [1e10] * 4, [1e6] * 4, [1e13] * 2, [1e9, 4e9], resident=[0.6e9, 0.6e9, 0.6e9, 0.1e9]
    )
    assert round_robin(problem, budget_s=1.0, seed=0).device_G.tolist() == [0, 1, 1, 0]


def test_searching_gains_where_layers_are_not_a_chain() -> None:
    for problem in (branchy(rates=(2e13, 2e13, 5e12, 5e12)), branchy(bytes_per_s=1.2e9)):
        by_hand = simulate(problem, expert(problem, budget_s=1.0, seed=0)).step_s
        assert simulate(problem, auto(problem, budget_s=1.0, seed=0)).step_s < by_hand / 1.2


def test_memory_is_told_with_what_would_help() -> None:
    build = Builder(1, [100.0])
    build.task(0, [1.0], [], scratch=60)
    with pytest.raises(PlacementError, match=r"gpu:0 needs 150 bytes and may use 100 bytes.*more microbatches"):
        hints_only(build.problem([90]), budget_s=1.0, seed=0)
