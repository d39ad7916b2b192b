"""From samples to figures: ratios, their spread, and whether the losses agreed. No I/O."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.catalogue import GROUPS, OURS
from bench.race import Race, Samples

Figure = dict[str, Any]

# Largest accepted relative difference from eager PyTorch's loss after the checked steps. It is what rounding and other
# orders of summation make of AdamW's first steps, which divide by the root of tiny gradients.
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-2}


def paired_ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of theirs / ours, round by round: above 1, ours took less."""
    return spread([a / b for a, b in zip(theirs, ours, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles; NaN of nothing."""
    if len(values) < 2:
        only = values[0] if values else math.nan
        return {"median": only, "low": only, "high": only}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def step_figure(race: Race) -> Figure:
    """Of one race: how many times as fast as each group of peers every way of ours is, and everybody's memory.

    A ratio is the median, over the rounds, of a peer's time per step / ours in the same round. The peer is the fastest
    variant of its group, among those with no more steps per call than ours.
    """
    ratios: dict[str, dict[str, Any]] = {}
    for ours in (s for s in race.samples.values() if s.spec.group == OURS):
        ratios[ours.spec.name] = {}
        for group in GROUPS:
            theirs = fastest(race.samples.values(), group, ours.spec.steps_per_call)
            if theirs is not None:
                ratio = paired_ratio(theirs.seconds, ours.seconds)
                ratios[ours.spec.name][group] = {**ratio, "variant": theirs.spec.name}
    peers = {name: _seen(s) | {"memory": memory_of(s.memory)} for name, s in race.samples.items()}
    return {**_heading("step", race), "ratios": ratios, "peers": peers}


def first_step_figure(race: Race) -> Figure:
    """Of one workload's fresh starts: everybody's seconds to the end of the first step."""
    return {**_heading("first_step", race), "peers": {name: _seen(s) for name, s in race.samples.items()}}


def fastest(samples: Iterable[Samples], group: str, steps_per_call: int) -> Samples | None:
    """The variant with the smallest median time."""
    rivals = [s for s in samples if s.spec.group == group and s.spec.steps_per_call <= steps_per_call and s.seconds]
    return min(rivals, key=lambda s: statistics.median(s.seconds), default=None)


def disagreeing(losses: Mapping[str, float], precision: str) -> list[str]:
    """Peers whose loss after the checked steps is not the reference's: eager PyTorch's, else the first peer's."""
    if not losses:
        return []
    wanted = losses.get("eager", next(iter(losses.values())))
    bound = LOSS_TOLERANCE[precision] * abs(wanted)
    return sorted(name for name, loss in losses.items() if not abs(loss - wanted) <= bound)


def memory_of(memory: Mapping[str, int]) -> dict[str, int]:
    """Peaks above what the process held after its imports.

    steps_bytes: while stepping, on the device if there is one. start_bytes: while tracing, compiling and taking the
    first steps. total_bytes: the whole process while stepping.
    """
    if not memory:
        return {}
    baseline = memory["baseline_bytes"]
    return {
        "steps_bytes": memory["device_peak_bytes"] or max(memory["steps_peak_bytes"] - baseline, 1),
        "start_bytes": max(memory["start_peak_bytes"] - baseline, 0),
        "total_bytes": memory["steps_peak_bytes"],
    }


def rounded(value: Any) -> Any:
    """Floats to five significant digits, which is more than a timing holds."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list) else value


def _heading(kind: str, race: Race) -> Figure:
    versions: dict[str, str] = {}
    for sample in race.samples.values():
        versions |= sample.ready["versions"]
    losses = {name: sample.ready["loss"] for name, sample in race.samples.items()}
    return {
        "name": f"{kind}/{race.workload.name}/{race.precision}",
        "kind": kind,
        "workload": race.workload.name,
        "title": race.workload.title,
        "precision": race.precision,
        "device": race.settings.device,
        "threads": race.settings.threads,
        "rounds": race.settings.rounds,
        "versions": versions,
        "disagreeing": disagreeing(losses, race.precision),
        "failed": dict(race.failed),
    }


def _seen(sample: Samples) -> Figure:
    said = {key: sample.ready[key] for key in ("steps", "loss", "tier", "said") if key in sample.ready}
    return {**spread(sample.seconds), "samples": len(sample.seconds), **said}
