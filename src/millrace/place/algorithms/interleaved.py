"""A pipeline in which every device has several ranges of the layers, that do not follow each other.

With fewer layers in a turn, a device waits less at the beginning and the end of a step; more crosses the links.

Source: Narayanan et al. 2021, "Efficient large-scale language model training on GPU clusters using Megatron-LM",
section 2.2.2 (the interleaved schedule, "virtual stages").
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from millrace.place.algorithms.finish import finish
from millrace.place.algorithms.pipeline import best_ranges, chain_of, pipeline, placement_of
from millrace.place.devices import device_sequences, pinned_devices
from millrace.place.order import best_scored
from millrace.place.problem import Ints, Plan, Problem

_TURNS = (2, 3, 4)  # ranges that a device has
_SEQUENCES = 12


def interleaved(problem: Problem, *, budget_s: float, seed: int) -> Plan:
    """The best of pipelines that go round the devices two to four times, by simulation.

    Ranges are found by the dynamic program of `pipeline.py`, with the order of devices repeated.

    With too few groups for two rounds it is what `pipeline` finds. Raises: PlacementError when nothing of this fits.
    """
    pinned_G = pinned_devices(problem)
    deadline = time.monotonic() + budget_s
    chain = chain_of(problem, pinned_G)
    found: list[tuple[float, float, int, Ints, str]] = []
    for turns in _TURNS:
        for devices in device_sequences(problem, _SEQUENCES):
            if len(devices) * turns >= len(chain.cuts_N) or len(devices) < 2:
                continue
            value, places = best_ranges(problem, chain, devices * turns, memory=False)
            if np.isfinite(value):
                device_G = placement_of(chain, devices * turns, places, pinned_G)
                score = best_scored(problem, device_G)[1]
                names = " → ".join(problem.device_names_D[d] for d in devices)
                note = f"{turns} times round {names}"
                found.append((score.over_bytes, score.step_s, len(found), device_G, note))
            if found and time.monotonic() > deadline:
                break
    if not found:
        plan = pipeline(problem, budget_s=budget_s, seed=seed)
        note = f"{plan.note}; there are too few groups for several ranges a device"
        return dataclasses.replace(plan, algorithm="interleaved", note=note)
    *_, device_G, note = min(found, key=lambda f: f[:3])
    return finish(problem, device_G, "interleaved", note)
