"""Simulated runs beside the published ones of the TensorFlow paper (Abadi et al., OSDI 2016, section 6.3).

What is published: Inception-v3 on K40 GPUs with 17 servers. The median synchronous step is about 10 % longer than the
asynchronous one with as many workers, and above its 90th percentile much longer; 2,300 images/s with 200 workers. With
50 workers, 4 backups make the shortest median step, 1.93 s; 3 make the best normalized speedup, 9.5 %, where that is
t(0) / t(b) × 50 / (50 + b).

Cards come from the paper's figure 6: one worker fetches 1 GB from 16 servers in 1.01 s, so a worker's card carries 1.0
GB/s; 100 workers fetch it in 7.16 s, so a server's carries 0.87 GB/s; a scalar takes 1.8 ms both ways. Inception-v3 has
23.8 million parameters. Images per step are not in the paper: 32 is what TensorFlow's own program took.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from millrace.replicas.scale.job import HEAVY_STRAGGLERS, Job, Network, Stragglers
from millrace.replicas.scale.simulate import simulate
from millrace.replicas.scale.ways import Asynchronous, Synchronous

SERVERS, WORKERS = 17, 50
PUBLISHED = {"step_s": 1.93, "speedup": 0.095, "images_per_s": 2300.0, "sync_over_async": 1.10}
NETWORK = Network(bytes_per_s=1.0e9, latency_s=0.9e-3, server_bytes_per_s=0.87e9)
INCEPTION = Job(
    compute_s=1.0, gradient_bytes=95.2e6, fetch_bytes=95.2e6, examples=32, sum_s_per_byte=3e-10, apply_s_per_byte=2.4e-9
)
BACKUPS = range(8)
_STEPS = 1000

# What differs is who is slow: many pauses, few pauses, or few pauses and some machines that are always slow, as many
# as the best number of backups.
CASES = {
    "heavy": HEAVY_STRAGGLERS,
    "light": Stragglers(),
    "slow machines": Stragglers(slow_share=0.06, slow_factor=1.25),
}


def compare(overlap: bool) -> list[dict[str, Any]]:
    """A row for each case: the fitted parameters, what comes out with backups, and sync against async."""
    return [_case(name, replace(INCEPTION, overlap=overlap), stragglers) for name, stragglers in CASES.items()]


def _case(name: str, job: Job, stragglers: Stragglers) -> dict[str, Any]:
    for _ in range(2):  # each fit moves the others a little
        job = _fit(
            job, lambda value, job=job: replace(job, apply_s_per_byte=value), 1e-10, 5e-9, _less_images(stragglers)
        )
        job = _fit(job, lambda value, job=job: replace(job, compute_s=value), 0.3, 3.0, _longer_step(stragglers))
    if stragglers.slow_share:
        low, high = 1.0, 2.0
        for _ in range(10):
            middle = (low + high) / 2
            stragglers = replace(stragglers, slow_factor=middle)
            low, high = (low, middle) if _speedup(job, stragglers, 3) > PUBLISHED["speedup"] else (middle, high)
        job = _fit(job, lambda value, job=job: replace(job, compute_s=value), 0.3, 3.0, _longer_step(stragglers))
    step_s_B = [_sync(job, stragglers, WORKERS, backup) for backup in BACKUPS]
    rows = []
    for workers in (25, 50, 100, 200):
        ways = Asynchronous(), Synchronous()
        one, other = (simulate(job, NETWORK, workers, SERVERS, w, 1, 400, stragglers=stragglers) for w in ways)
        row = {"workers": workers, "async_s": one.step_s, "async_p90_s": one.step_p90_s, "sync_s": other.step_s}
        images = {"async_images_per_s": one.examples_per_s, "sync_images_per_s": other.examples_per_s}
        rows.append(row | {"sync_p90_s": other.step_p90_s, "sync_p99_s": other.step_p99_s} | images)
    return {
        "name": name,
        "overlap": job.overlap,
        "compute_s": job.compute_s,
        "apply_s_per_byte": job.apply_s_per_byte,
        "slow_factor": stragglers.slow_factor,
        "step_s_by_backups": step_s_B,
        "speedup_by_backups": [step_s_B[0] / s * WORKERS / (WORKERS + b) - 1 for b, s in enumerate(step_s_B)],
        "by_workers": rows,
    }


def _fit(job: Job, changed: Callable[[float], Job], low: float, high: float, above: Callable[[Job], bool]) -> Job:
    """The job with a parameter just where `above` becomes true, or the end of its range nearest to that."""
    for _ in range(9):
        middle = (low + high) / 2
        low, high = (low, middle) if above(changed(middle)) else (middle, high)
    return changed((low + high) / 2)


def _less_images(stragglers: Stragglers) -> Callable[[Job], bool]:
    def less(job: Job) -> bool:
        found = simulate(job, NETWORK, 200, SERVERS, Asynchronous(), 1, 40, stragglers=stragglers)
        return found.examples_per_s < PUBLISHED["images_per_s"]

    return less


def _longer_step(stragglers: Stragglers) -> Callable[[Job], bool]:
    return lambda job: _sync(job, stragglers, WORKERS, 4, 250) > PUBLISHED["step_s"]


def _speedup(job: Job, stragglers: Stragglers, backup: int) -> float:
    alone_s, backed_s = (_sync(job, stragglers, WORKERS, b, 600) for b in (0, backup))
    return alone_s / backed_s * WORKERS / (WORKERS + backup) - 1


def _sync(job: Job, stragglers: Stragglers, workers: int, backup: int, steps: int = _STEPS) -> float:
    return simulate(job, NETWORK, workers, SERVERS, Synchronous(backup), 1, steps, stragglers=stragglers).step_s
