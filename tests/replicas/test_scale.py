"""Simulated runs against what can be said in closed form, and what must hold of every run."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.errors import SettingError
from millrace.replicas.scale.collective import ring_s
from millrace.replicas.scale.job import NO_STRAGGLERS, Failures, Job, Network, Stragglers
from millrace.replicas.scale.limits import saturation, servers_needed
from millrace.replicas.scale.simulate import UNBOUNDED, simulate
from millrace.replicas.scale.ways import Asynchronous, Collective, Hybrid, Synchronous, Way
from millrace.replicas.scale.wire import Wire

JOB = Job(compute_s=0.5, gradient_bytes=1e8, fetch_bytes=1e8, examples=32)
IDEAL = Network(bytes_per_s=1e18, latency_s=0.0)
SLOW = Network(bytes_per_s=1e9, latency_s=1e-3)
EVERY_WAY: list[Way] = [Collective(), Synchronous(), Synchronous(2), Asynchronous(), Asynchronous(2, 3), Hybrid(4)]


@pytest.mark.parametrize("way", EVERY_WAY)
@pytest.mark.parametrize("workers", [8, 64])
def test_equal_workers_on_an_ideal_network_are_as_many_times_as_fast(way: Way, workers: int) -> None:
    found = simulate(JOB, IDEAL, workers, 2, way, steps=40, stragglers=NO_STRAGGLERS)
    assert found.examples_per_s == pytest.approx(workers * JOB.examples / JOB.compute_s, rel=0.05)
    assert found.worker_share == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("servers", [1, 3])
def test_a_synchronous_step_of_equal_workers_is_the_sum_of_its_parts(servers: int) -> None:
    job = replace(JOB, sum_s_per_byte=1e-10, apply_s_per_byte=4e-10)
    found = simulate(job, SLOW, 16, servers, Synchronous(), steps=20, stragglers=NO_STRAGGLERS)
    # All push and fetch at once, so all share the cards of the servers; then these add 16 gradients and update.
    transfer_s = max(16 * 1e8 / (servers * 1e9), 1e8 / 1e9)
    work_s = 1e8 / servers * (16 * 1e-10 + 4e-10)
    assert found.step_s == pytest.approx(0.5 + 2 * transfer_s + 2e-3 + work_s)
    assert found.server_in_share == pytest.approx(16 * 1e8 / (servers * 1e9) / found.step_s)
    assert found.server_work_share == pytest.approx(work_s / found.step_s)


def test_where_cards_of_servers_are_the_limit_pushes_come_at_their_rate() -> None:
    # Fetching is what takes longest here: were it as long as pushing, workers in step would leave each idle in turn.
    found = simulate(replace(JOB, gradient_bytes=1e7), SLOW, 200, 2, Asynchronous(), steps=40)
    assert found.steps_per_s == pytest.approx(2 * 1e9 / 1e8, rel=0.02)
    assert max(found.server_in_share, found.server_out_share) == pytest.approx(1.0, abs=0.02)


def test_where_the_work_of_servers_is_the_limit_pushes_come_at_its_rate() -> None:
    job = replace(JOB, apply_s_per_byte=1e-8)
    found = simulate(job, IDEAL, 100, 4, Asynchronous(), steps=20)
    assert found.steps_per_s == pytest.approx(4 / (1e8 * 1e-8), rel=0.02)
    assert found.server_work_share == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("workers", [1, 2, 64])
def test_a_ring(workers: int) -> None:
    seconds = 2 * (workers - 1) / workers * 1e8 / 1e9 + 2 * (workers - 1) * 1e-3
    assert ring_s(1e8, workers, SLOW) == pytest.approx(seconds)
    found = simulate(JOB, SLOW, workers, 0, Collective(), steps=5, stragglers=NO_STRAGGLERS)
    assert found.step_s == pytest.approx(0.5 + seconds)
    local = simulate(JOB, SLOW, workers, 0, Collective(every=10), steps=5, stragglers=NO_STRAGGLERS)
    assert local.step_s == pytest.approx(5.0 + seconds)


@pytest.mark.parametrize("workers", [2, 32])
def test_staleness_of_equal_workers_is_that_all_others_come_between(workers: int) -> None:
    jitter = Stragglers(pauses_per_s=0.0)
    found = simulate(JOB, SLOW, workers, UNBOUNDED, Asynchronous(), steps=50, stragglers=jitter)
    assert found.tau_mean == pytest.approx(workers - 1, rel=0.02)
    groups = simulate(JOB, SLOW, 4 * workers, UNBOUNDED, Hybrid(4), steps=50, stragglers=jitter)
    assert groups.tau_mean == pytest.approx(workers - 1, rel=0.02)


def test_staleness_grows_with_the_steps_between_two_fetches() -> None:
    found = simulate(JOB, SLOW, 10, UNBOUNDED, Asynchronous(fetch_every=4), steps=80, stragglers=NO_STRAGGLERS)
    # Pushes 1 … 4 after a fetch follow 9, 19, 29, 39 others.
    assert found.tau_mean == pytest.approx((9 + 19 + 29 + 39) / 4, rel=0.05)


@pytest.mark.parametrize(("workers", "backup"), [(20, 0), (50, 2), (50, 5)])
def test_a_step_with_backups_is_an_order_statistic(workers: int, backup: int) -> None:
    """With short tails nobody is ever a whole step late, so N + b start together, but for those who come late."""
    sigma = 0.05
    found = simulate(
        JOB, IDEAL, workers, UNBOUNDED, Synchronous(backup), steps=2000, stragglers=Stragglers(sigma, pauses_per_s=0)
    )
    drawn = np.exp(sigma * np.random.default_rng(1).standard_normal((20000, workers + backup)))
    expected_s = 0.5 * float(np.median(np.sort(drawn)[:, workers - 1]))
    # A late worker starts the next step late, and is then late more often: the step is a little longer.
    assert found.step_s == pytest.approx(expected_s, rel=0.004 if backup == 0 else 0.012)
    assert found.step_s >= 0.998 * expected_s


def test_rare_pauses_are_waited_for_unless_there_are_backups() -> None:
    pauses = Stragglers(jitter=0.0, pauses_per_s=0.01, pause_s=5.0, pause_sigma=0.0)
    alone = simulate(JOB, IDEAL, 30, 1, Synchronous(), steps=1000, stragglers=pauses)
    paused_share = 1 - math.exp(-0.01 * JOB.compute_s * 30)
    mean_s = 1 / alone.steps_per_s
    assert mean_s == pytest.approx(JOB.compute_s + paused_share * 5.0, rel=0.1)
    backed = simulate(JOB, IDEAL, 30, 1, Synchronous(6, late_waits=True), steps=1000, stragglers=pauses)
    assert 1 / backed.steps_per_s == pytest.approx(JOB.compute_s, rel=0.02)
    assert backed.dropped > 0
    # Who begins at once after a pause stays behind the others, and is of less use.
    behind = simulate(JOB, IDEAL, 30, 1, Synchronous(6), steps=1000, stragglers=pauses)
    assert alone.steps_per_s < behind.steps_per_s < backed.steps_per_s


def test_slow_machines_hold_up_synchronous_steps_only() -> None:
    slow = replace(NO_STRAGGLERS, slow_share=0.1, slow_factor=2.0)
    for way in (Collective(), Synchronous()):
        assert simulate(JOB, IDEAL, 20, 1, way, steps=10, stragglers=slow).step_s == pytest.approx(1.0)
    assert simulate(JOB, IDEAL, 20, 1, Synchronous(3), steps=10, stragglers=slow).step_s == pytest.approx(0.5)
    found = simulate(JOB, IDEAL, 20, 1, Asynchronous(), steps=40, stragglers=slow)
    assert found.examples_per_s == pytest.approx((18 + 2 / 2) * 32 / 0.5, rel=0.02)


def test_overlap_hides_transfers_behind_computing() -> None:
    job = replace(JOB, overlap=True)
    for way in (Collective(), Synchronous(), Asynchronous()):
        found = simulate(job, replace(SLOW, latency_s=0.0), 4, 64, way, steps=20, stragglers=NO_STRAGGLERS)
        assert found.step_s == pytest.approx(JOB.compute_s)  # each transfer takes 0.1 s of its 0.167 and 0.333
    wide = simulate(job, replace(SLOW, latency_s=0.0), 32, 4, Synchronous(), steps=20, stragglers=NO_STRAGGLERS)
    assert wide.step_s == pytest.approx(0.8 + 0.8)  # 32 × 0.1 / 4 s for each direction, longer than both passes


def test_deaths_cost_everybody_in_a_collective_and_one_worker_elsewhere() -> None:
    failures = Failures(mean_s=1000.0, recovery_s=5.0)
    found = simulate(JOB, IDEAL, 100, 0, Collective(), steps=400, stragglers=NO_STRAGGLERS, failures=failures)
    # One of a hundred dies every 10 s; it costs 5 s and half a step in the mean, of 0.5 s.
    assert 1 / found.steps_per_s == pytest.approx(0.5 * (1 + 0.1 * 5.25), rel=0.15)
    alone = simulate(JOB, IDEAL, 100, 1, Asynchronous(), steps=400, stragglers=NO_STRAGGLERS, failures=failures)
    assert alone.examples_per_s == pytest.approx(100 * 32 / 0.5 / (1 + 5.25 / 1000), rel=0.005)
    assert found.lost > 0
    assert alone.lost == pytest.approx(100 * 400 * 0.5 / 1000, rel=0.5)


@settings(max_examples=60, deadline=None)
@given(
    way=st.sampled_from(EVERY_WAY),
    workers=st.sampled_from([4, 8, 20]),
    servers=st.integers(1, 9),
    seed=st.integers(0, 99),
    overlap=st.booleans(),
    bytes_per_s=st.sampled_from([1e8, 1e9, 1e18]),
    slow_share=st.sampled_from([0.0, 0.3]),
    death_s=st.sampled_from([0.0, 2000.0]),
)
def test_what_holds_of_every_run(
    way: Way,
    workers: int,
    servers: int,
    seed: int,
    overlap: bool,
    bytes_per_s: float,
    slow_share: float,
    death_s: float,
) -> None:
    job = replace(JOB, sum_s_per_byte=1e-10, apply_s_per_byte=1e-9, overlap=overlap)
    stragglers = Stragglers(jitter=0.3, pauses_per_s=0.1, pause_sigma=0.3, slow_share=slow_share, slow_factor=2.0)
    failures = Failures(death_s, 1.0)
    network = Network(bytes_per_s, 1e-3)

    def run() -> object:
        return simulate(job, network, workers, servers, way, seed, 15, stragglers=stragglers, failures=failures)

    found = simulate(job, network, workers, servers, way, seed, 15, stragglers=stragglers, failures=failures)
    assert run() == found
    assert found.computed == found.applied + found.dropped + found.in_flight
    assert 0 <= found.in_flight <= found.machines * 3
    for share in (found.server_in_share, found.server_out_share, found.server_work_share, found.worker_share):
        assert 0 <= share <= 1.25  # work is counted when it begins, so that the ends of a short run may add some
    assert found.step_s <= found.step_p90_s <= found.step_p99_s
    assert found.examples_per_s <= workers * JOB.examples / JOB.compute_s * 1.5


def test_another_seed_is_another_run() -> None:
    first, second = (simulate(JOB, SLOW, 8, 2, Asynchronous(), seed) for seed in (0, 1))
    assert first != second


def test_a_wire_divides_its_rate_equally_and_no_transfer_exceeds_a_card() -> None:
    wire = Wire(all_bytes_per_s=10.0, each_bytes_per_s=6.0)
    wire.start(0.0, 12.0, 1)  # alone: 6 bytes/s
    wire.start(1.0, 5.0, 2)  # 6 bytes of the first are left; now 5 bytes/s each
    ends = []
    while wire:
        ends.append((wire.next_s, wire.finish()))
    assert ends == [(2.0, 2), (pytest.approx(2.0 + 1 / 6), 1)]
    assert wire.carried_bytes(9.0) == pytest.approx(17.0)
    assert wire.next_s == math.inf


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0.1, 50)), min_size=1, max_size=12))
def test_a_wire_ends_transfers_where_small_time_steps_would(asked: list[tuple[float, float]]) -> None:
    asked = sorted(asked)
    wire, ends, waiting = Wire(10.0, 6.0), {}, list(enumerate(asked))
    while waiting or wire:
        if waiting and waiting[0][1][0] <= wire.next_s:
            who, (at_s, size) = waiting.pop(0)
            wire.start(at_s, size, who)
        else:
            at_s = wire.next_s
            ends[wire.finish()] = at_s
    step_s, now_s, left = 0.002, 0.0, [size for _, size in asked]
    found: dict[int, float] = {}
    while len(found) < len(asked):
        active = [who for who, (at_s, _) in enumerate(asked) if at_s <= now_s and who not in found]
        for who in active:
            left[who] -= min(6.0, 10.0 / len(active)) * step_s
        now_s += step_s
        found |= {who: now_s for who in active if left[who] <= 0}
    assert ends == pytest.approx(found, abs=0.05)


def test_saturation_and_servers() -> None:
    assert saturation({8: 10.0, 16: 20.0, 32: 21.0, 64: 40.0}) == 16
    assert saturation({8: 10.0, 16: 20.0}) is None
    for wanted in (1, 2, 3, 37, 64):
        assert servers_needed(lambda servers, wanted=wanted: min(1.0, 0.9 * servers / wanted), 1.0) == wanted
    assert servers_needed(lambda servers: 0.1, 1.0, most=64) is None


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(SettingError, match="groups of 3"):
        simulate(JOB, SLOW, 8, 1, Hybrid(3))
    with pytest.raises(SettingError, match="1 server or more"):
        simulate(JOB, SLOW, 8, 0, Asynchronous())
    with pytest.raises(SettingError, match="1 worker"):
        simulate(JOB, SLOW, 0, 1, Asynchronous())
    with pytest.raises(SettingError, match=r"Job\.compute_s"):
        replace(JOB, compute_s=-1.0)
    with pytest.raises(SettingError, match="hardly ever"):
        simulate(JOB, SLOW, 40, 1, Collective(), steps=10, failures=Failures(1.0, 1.0))
    with pytest.raises(SettingError, match="backup"):
        Synchronous(-1)
