"""Synchronous steps without servers: a ring all-reduce, after which every worker updates by itself."""

from __future__ import annotations

from millrace.errors import SettingError
from millrace.replicas.scale.events import WARM_UP, Setup
from millrace.replicas.scale.job import FORWARD_SHARE, Network
from millrace.replicas.scale.noise import Computing, Deaths
from millrace.replicas.scale.outcome import Outcome, percentiles
from millrace.replicas.scale.ways import Collective

_HOPELESS = 100  # as many computations lost as there are wanted, that many times


def ring_s(size_bytes: float, workers: int, network: Network) -> float:
    """A ring all-reduce: 2 (n - 1) rounds, in each of which every worker sends its neighbour an n-th of the bytes.

    Source: Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".
    """
    return 2 * (workers - 1) * (size_bytes / workers / network.bytes_per_s + network.latency_s)


def broadcast_s(size_bytes: float, workers: int, network: Network) -> float:
    """A chain of workers that each pass on small pieces as they come: the bytes once, and a latency per link."""
    return size_bytes / network.bytes_per_s + (workers - 1) * network.latency_s if workers > 1 else 0.0


def reduced_s(slowest_s: float, reduce_s: float, overlap: bool) -> float:
    """Computing and then reducing; with overlap, reducing may begin with the slowest worker's backward pass."""
    return max(slowest_s, FORWARD_SHARE * slowest_s + reduce_s) if overlap else slowest_s + reduce_s


def collective_run(setup: Setup, way: Collective) -> Outcome:
    """Step after step; a death costs all workers the time since the last all-reduce, and its recovery.

    Every worker computes `every` times by itself between two all-reduces; only those are counted as updates.
    """
    job, workers = setup.job, setup.workers
    computing = Computing(job, setup.stragglers, workers, 1, setup.seed)
    deaths = Deaths(setup.failures, 1, workers, setup.seed)
    reduce_s = ring_s(job.gradient_bytes, workers, setup.network)
    update_s = job.gradient_bytes * job.apply_s_per_byte
    now_s, step_s, worked_s, lost = 0.0, list[float](), list[float](), 0
    while len(step_s) < setup.steps:
        start_s, begun_s = now_s, now_s
        while True:
            own_s = [sum(computing.next(worker)[0] for _ in range(way.every)) for worker in range(workers)]
            slowest_s = reduced_s(max(own_s), reduce_s, job.overlap and way.every == 1)
            now_s = begun_s + slowest_s + way.every * update_s
            death_s = deaths.strike(0, begun_s, now_s)
            if death_s is None:
                break
            lost += workers * way.every
            begun_s = death_s + deaths.recovery_s
            if lost > _HOPELESS * setup.steps * workers * way.every:
                raise SettingError(
                    f"{workers} workers of which one dies every {setup.failures.mean_s / workers:.3g} s hardly ever "
                    f"end a step of {slowest_s:.3g} s; simulate fewer workers, or failures that are rarer."
                )
        step_s.append(now_s - start_s)
        worked_s.append(sum(own_s))
    warm = int(WARM_UP * setup.steps)
    seconds, gradients = sum(step_s[warm:]), setup.steps * workers * way.every
    median_s, p90_s, p99_s = percentiles(step_s[warm:])
    steps_per_s = len(step_s[warm:]) / seconds
    return Outcome(
        workers=workers,
        machines=workers,
        servers=0,
        steps_per_s=steps_per_s,
        examples_per_s=steps_per_s * workers * way.every * job.examples,
        step_s=median_s,
        step_p90_s=p90_s,
        step_p99_s=p99_s,
        tau_counts=(len(step_s[warm:]),),
        computed=gradients,
        applied=gradients,
        dropped=0,
        in_flight=0,
        lost=lost,
        server_in_share=0.0,
        server_out_share=0.0,
        server_work_share=0.0,
        worker_share=sum(worked_s[warm:]) / seconds / workers,
    )
