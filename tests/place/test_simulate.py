"""The simulated step keeps to what any step must."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.place.brute import memory_over_time, random_plan
from tests.place.problems import Builder, problems

from millrace.errors import PlacementError
from millrace.place.order import longest_way
from millrace.place.problem import Plan, Problem
from millrace.place.simulate import simulate

SEEDS = st.integers(0, 2**32 - 1)


@given(problems(), SEEDS)
@settings(max_examples=150, deadline=None)
def test_a_step_is_as_long_as_its_longest_way_and_its_busiest_device(problem: Problem, seed: int) -> None:
    plan = random_plan(problem, np.random.default_rng(seed))
    simulated = simulate(problem, plan)
    own_s_T = problem.seconds_TD[np.arange(problem.tasks), plan.device_G[problem.group_T]]
    longest_s = longest_way(problem, own_s_T, np.zeros(len(problem.uses_C))).max()
    assert simulated.step_s >= longest_s * (1 - 1e-12)
    assert simulated.step_s >= simulated.busy_s_D.max() * (1 - 1e-12)
    assert simulated.busy_s_D.sum() == pytest.approx(own_s_T.sum())
    assert np.allclose(simulated.end_s_T - simulated.start_s_T, own_s_T)


@given(problems(devices=1), SEEDS)
@settings(max_examples=50, deadline=None)
def test_on_one_device_a_step_is_the_sum_of_its_tasks(problem: Problem, seed: int) -> None:
    simulated = simulate(problem, random_plan(problem, np.random.default_rng(seed)))
    assert simulated.step_s == pytest.approx(problem.seconds_TD.sum())
    assert not simulated.transfers


@given(problems(), SEEDS)
@settings(max_examples=150, deadline=None)
def test_memory_is_what_the_lifetimes_of_tensors_add_up_to(problem: Problem, seed: int) -> None:
    plan = random_plan(problem, np.random.default_rng(seed))
    simulated = simulate(problem, plan)
    np.testing.assert_array_equal(simulated.peak_bytes_D, memory_over_time(problem, plan, simulated))


@given(problems(), SEEDS)
@settings(max_examples=150, deadline=None)
def test_transfers_wait_for_producer_and_wire_and_readers_for_transfers(problem: Problem, seed: int) -> None:
    plan = random_plan(problem, np.random.default_rng(seed))
    simulated = simulate(problem, plan)
    device_T = plan.device_G[problem.group_T]
    arrived = {(t.tensor, t.target): t for t in simulated.transfers}
    assert len(arrived) == len(simulated.transfers)  # each tensor once to each device
    free: dict[object, float] = {}
    for t in simulated.transfers:
        wire: object = int(problem.wire_DD[t.source, t.target])
        if wire == -1:  # the sender itself: all that it sends of a task, one after the other, and no task meanwhile
            wire = (t.source, int(problem.producer_K[t.tensor]))
            during_T = (simulated.start_s_T < t.end_s) & (simulated.end_s_T > t.start_s)
            assert not during_T[device_T == t.source].any()
        assert t.start_s == max(simulated.end_s_T[problem.producer_K[t.tensor]], free.get(wire, 0.0))
        seconds = problem.latency_s_DD[t.source, t.target] + t.size_bytes / problem.bytes_per_s_DD[t.source, t.target]
        assert t.end_s == pytest.approx(t.start_s + seconds)
        free[wire] = t.end_s
    needed = set()
    for tensor, producer in enumerate(problem.producer_K):
        for task in problem.uses_C[problem.first_use_K1[tensor] : problem.first_use_K1[tensor + 1]]:
            if device_T[task] != device_T[producer]:
                needed.add((tensor, int(device_T[task])))
                assert simulated.start_s_T[task] >= arrived[tensor, int(device_T[task])].end_s
            else:
                assert simulated.start_s_T[task] >= simulated.end_s_T[producer]
    assert needed == set(arrived)
    assert simulated.bytes_DD.sum() == sum(t.size_bytes for t in simulated.transfers)


def test_two_devices_overlap_and_pay_for_the_wire() -> None:
    build = Builder(2, [100.0, 100.0], latency_s=0.5, bytes_per_s=10.0)
    first = build.task(0, [1.0, 9.0], [])
    tensor = build.tensor(first, 20)
    build.task(0, [3.0, 9.0], [tensor], scratch=5)
    build.task(1, [9.0, 2.0], [tensor])
    simulated = simulate(build.problem([7, 11]), Plan(np.array([0, 1]), np.arange(3)))
    assert simulated.step_s == 1.0 + 0.5 + 2.0 + 2.0  # a task, latency, 20 bytes, a task
    assert simulated.end_s_T.tolist() == [1.0, 4.0, 5.5]
    assert simulated.peak_bytes_D.tolist() == [7 + 20 + 5, 11 + 20]
    assert simulated.fits


def test_what_exceeds_memory_is_told() -> None:
    build = Builder(1, [100.0])
    build.tensor(build.task(0, [1.0], []), 30)
    simulated = simulate(build.problem([90]), Plan(np.array([0]), np.arange(1)))
    assert not simulated.fits
    assert simulated.over_bytes_D.tolist() == [20.0]


def test_a_shared_wire_carries_one_tensor_at_a_time() -> None:
    ends = []
    for shared in (False, True):
        build = Builder(3, [1e3] * 3, latency_s=0.0, bytes_per_s=10.0, shared=shared)
        tensor = build.tensor(build.task(0, [1.0] * 3, []), 10)
        build.task(1, [1.0] * 3, [tensor])
        build.task(2, [1.0] * 3, [tensor])
        ends.append(simulate(build.problem(), Plan(np.arange(3), np.arange(3))).end_s_T.tolist())
    assert ends == [[1.0, 3.0, 3.0], [1.0, 3.0, 4.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order_T": np.array([1, 0])}, "runs t1 before"),
        ({"order_T": np.array([0, 0])}, "each of 2 tasks once"),
        ({"device_G": np.array([3])}, "places"),
        ({"device_G": np.array([0, 0])}, "places"),
    ],
)
def test_a_plan_for_another_problem_is_refused(change: dict[str, object], message: str) -> None:
    build = Builder(1, [100.0])
    tensor = build.tensor(build.task(0, [1.0], []), 1)
    build.task(0, [1.0], [tensor])
    plan = dataclasses.replace(Plan(np.array([0]), np.array([0, 1]), "mine"), **change)
    with pytest.raises(PlacementError, match=message) as caught:
        simulate(build.problem(), plan)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
