"""Orders that can run, and what they are good for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.place.brute import random_plan
from tests.place.problems import chain, problems

from millrace.place.order import (
    backward_first_order,
    best_order,
    gpipe_order,
    list_order,
    one_forward_one_backward_order,
    orders,
)
from millrace.place.problem import Ints, Plan, Problem
from millrace.place.simulate import check_plan, simulate

ORDERS = [list_order, backward_first_order, gpipe_order, one_forward_one_backward_order, best_order]
Order = Callable[[Problem, Ints], Ints]


@pytest.mark.parametrize("order", ORDERS)
@given(problem=problems(groups=8, tasks=40), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_every_order_can_run(order: Order, problem: Problem, seed: int) -> None:
    device_G = random_plan(problem, np.random.default_rng(seed)).device_G
    check_plan(problem, Plan(device_G, order(problem, device_G)))


@given(problems(groups=8, tasks=40), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_the_best_order_is_as_good_as_each(problem: Problem, seed: int) -> None:
    device_G = random_plan(problem, np.random.default_rng(seed)).device_G
    best = simulate(problem, Plan(device_G, best_order(problem, device_G))).step_s
    assert best == min(simulate(problem, Plan(device_G, order_T)).step_s for order_T in orders(problem, device_G))


def test_one_forward_one_backward_holds_fewer_microbatches_in_about_the_same_time() -> None:
    problem = chain(8, 16, resident=[0.0] * 8)
    device_G = np.arange(8) // 2
    waves = simulate(problem, Plan(device_G, gpipe_order(problem, device_G)))
    turns = simulate(problem, Plan(device_G, one_forward_one_backward_order(problem, device_G)))
    assert turns.peak_bytes_D[0] < 0.6 * waves.peak_bytes_D[0]
    assert turns.step_s < 1.1 * waves.step_s


@pytest.mark.parametrize("order", ORDERS)
def test_microbatches_fill_a_pipeline(order: Order) -> None:
    """Of 16 microbatches through 4 equal stages, 3 stages wait at each end: 19 turns instead of 64."""
    problem = chain(8, 16, bytes_per_s=1e15, latency_s=0.0)
    device_G = np.arange(8) // 2
    alone = problem.seconds_TD[:, 0].sum()
    step_s = simulate(problem, Plan(device_G, order(problem, device_G))).step_s
    assert step_s < alone * 20.5 / 64
