"""Devices of one host slow each other down by as much as they work at the same time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.place.brute import random_plan
from tests.place.problems import Builder, problems

from millrace.place.contention import expect
from millrace.place.problem import Plan, Problem
from millrace.place.simulate import simulate

PLACED_APART = Plan(np.array([0, 1]), np.array([0, 1]))


def two_tasks(first_s: float, second_s: float, hosts: tuple[int, int] = (0, 0), *, chained: bool = False) -> Problem:
    """One task for each of two devices, which take twice as long while the other works."""
    build = Builder(2, [1e9, 1e9], latency_s=0.0, bytes_per_s=1e30)
    build.task(0, [first_s * 2] * 2, [])
    build.task(1, [second_s * 2] * 2, [build.tensor(0, 1)] if chained else [])
    problem = build.problem()
    return replace(problem, alone_s_TD=problem.seconds_TD / 2, host_D=np.array(hosts))


def test_both_work_all_the_time() -> None:
    assert expect(two_tasks(3.0, 3.0), PLACED_APART).step_s == pytest.approx(6.0)


def test_one_after_the_other_is_at_the_pace_of_one() -> None:
    assert expect(two_tasks(3.0, 2.0, chained=True), PLACED_APART).step_s == pytest.approx(5.0, rel=1e-3)


def test_on_hosts_of_their_own_they_do_not_meet() -> None:
    assert expect(two_tasks(3.0, 3.0, hosts=(0, 1)), PLACED_APART).step_s == pytest.approx(3.0, rel=1e-3)


def test_the_longer_task_is_slowed_only_while_the_shorter_one_runs() -> None:
    # Together until the short one has ended, at 2; then half of a second is left of the long one.
    found = expect(two_tasks(1.5, 1.0), PLACED_APART)
    assert found.end_s_T[1] == pytest.approx(2.0, rel=1e-3)
    assert found.step_s == pytest.approx(2.5, rel=1e-3)


@given(problems(), st.integers(0, 2**32 - 1), st.floats(0.3, 1.0))
@settings(max_examples=60, deadline=None)
def test_expected_lies_between_all_alone_and_all_busy(problem: Problem, seed: int, faster: float) -> None:
    plan = random_plan(problem, np.random.default_rng(seed))
    alone = replace(problem, seconds_TD=problem.seconds_TD * faster)
    shared = replace(problem, alone_s_TD=alone.seconds_TD, host_D=np.zeros(problem.devices, dtype=np.int64))
    found = expect(shared, plan)
    assert simulate(alone, plan).busy_s_D.sum() <= found.busy_s_D.sum() * (1 + 1e-9)
    assert found.busy_s_D.sum() <= simulate(problem, plan).busy_s_D.sum() * (1 + 1e-9)
    assert expect(problem, plan).step_s == simulate(problem, plan).step_s
