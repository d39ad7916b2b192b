"""From samples to figures: ratios, their spread, and whether the losses agreed. No I/O."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from catalogue import OURS, TORCH
from driver import Race, Samples

# Largest accepted relative difference from eager PyTorch's loss after the checked steps. It is what rounding and other
# orders of summation make of AdamW's first steps, which divide by the root of tiny gradients.
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-2}


def step_time_figures(race: Race) -> list[dict[str, Any]]:
    """One figure for each of our ways to run the workload: how many times as fast as every peer.

    A ratio is the median, over the rounds, of peer's time / our time in the same round; above 1 we are faster.
    """
    return [_step_time_figure(race, ours) for ours in race.samples.values() if ours.spec.kind == OURS]


def _step_time_figure(race: Race, ours: Samples) -> dict[str, Any]:
    others = {name: sample for name, sample in race.samples.items() if sample.spec.kind != OURS}
    ratios = {name: paired_ratio(sample.step_s, ours.step_s) for name, sample in others.items()}
    best = best_torch(race)
    agreement = losses_agree(race)
    return {
        "name": f"step_time/{race.workload.name}/{race.precision}/{ours.spec.name}",
        "ratio": ratios[best]["median"] if best else None,
        "best_torch": best,
        "ratios": ratios,
        "peers": {name: _seen(sample) for name, sample in {ours.spec.name: ours, **others}.items()},
        "losses_agree": agreement[ours.spec.name],
        "disagreeing": sorted(name for name, agrees in agreement.items() if not agrees),
        "failed": race.failed,
        "workload": race.workload.title,
        "precision": race.precision,
        "check_steps": race.workload.check_steps,
        "steps_per_turn": race.steps_per_turn,
        "rounds": race.settings.rounds,
        "threads": race.settings.threads,
        "device": race.settings.device,
        "versions": versions_of(race.samples.values()),
    }


def paired_ratio(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of theirs / ours, round by round."""
    return spread([a / b for a, b in zip(theirs, ours, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]} if values else {"median": math.nan}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def best_torch(race: Race) -> str | None:
    """The PyTorch peer with the smallest median time."""
    medians = {n: statistics.median(s.step_s) for n, s in race.samples.items() if s.spec.kind == TORCH and s.step_s}
    return min(medians, key=medians.__getitem__) if medians else None


def losses_agree(race: Race) -> dict[str, bool]:
    """For every peer, whether its loss after the checked steps is the reference's.

    The reference is eager PyTorch where it ran, else the first peer.
    """
    if not race.samples:
        return {}
    reference = race.samples.get("eager") or next(iter(race.samples.values()))
    wanted = reference.ready["loss"]
    tolerance = LOSS_TOLERANCE[race.precision]
    return {n: abs(s.ready["loss"] - wanted) <= tolerance * abs(wanted) for n, s in race.samples.items()}


def memory_figure(race: Race, ours: Samples) -> dict[str, Any]:
    """Our peak memory over each peer's, while stepping; below 1 we need less."""
    peaks = {name: memory_of(sample) for name, sample in race.samples.items()}
    mine = peaks[ours.spec.name]
    others = {n: p for n, p in peaks.items() if race.samples[n].spec.kind != OURS}
    return {
        "name": f"memory/{race.workload.name}/{race.precision}/{ours.spec.name}",
        "ratio": mine["steps_bytes"] / others["eager"]["steps_bytes"] if "eager" in others else None,
        "ratios": {name: mine["steps_bytes"] / peak["steps_bytes"] for name, peak in others.items()},
        "peers": {ours.spec.name: mine, **others},
        "losses_agree": losses_agree(race)[ours.spec.name],
        "failed": race.failed,
        "workload": race.workload.title,
        "precision": race.precision,
        "threads": race.settings.threads,
        "device": race.settings.device,
        "versions": versions_of(race.samples.values()),
    }


def memory_of(sample: Samples) -> dict[str, int]:
    """Peaks above what the process held after its imports.

    steps_bytes: while stepping, on the device if there is one. start_bytes: while tracing, compiling and taking the
    first steps.
    """
    memory = sample.memory
    on_host = max(memory["steps_peak_bytes"] - memory["baseline_bytes"], 1)
    return {
        "steps_bytes": memory["device_peak_bytes"] or on_host,
        "host_steps_bytes": on_host,
        "start_bytes": memory["start_peak_bytes"] - memory["baseline_bytes"],
        "baseline_bytes": memory["baseline_bytes"],
    }


def versions_of(samples: Any) -> dict[str, str]:
    """Versions of every framework that took part."""
    merged: dict[str, str] = {}
    for sample in samples:
        merged |= sample.ready["versions"]
    return merged


def _seen(sample: Samples) -> dict[str, Any]:
    time = spread(sample.step_s)
    return {
        "median_s": time["median"],
        "low_s": time.get("low"),
        "high_s": time.get("high"),
        "check_loss": sample.ready["loss"],
        "final_loss": sample.final_loss,
        "first_step_s": sample.ready["first_step_s"],
        **{key: sample.ready[key] for key in ("tier", "said") if key in sample.ready},
    }


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Columns as wide as their widest cell; the first on the left, the others on the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def times(ratio: float | Mapping[str, float] | None) -> str:
    """A ratio for people: "1.23×"."""
    value = ratio.get("median") if isinstance(ratio, Mapping) else ratio
    return "-" if value is None or math.isnan(value) else f"{value:.2f}×"
