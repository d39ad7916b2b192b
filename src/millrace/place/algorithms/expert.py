"""What a careful person does by hand: ranges of layers, in order, on the fast devices or on all by their speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from millrace.place.algorithms.finish import finish
from millrace.place.devices import ALIKE, pinned_devices, pipeline_order, total_seconds
from millrace.place.memory import estimated_bytes
from millrace.place.order import best_scored
from millrace.place.problem import Floats, Ints, Plan, Problem
from millrace.place.tables import tables


def expert(problem: Problem, *, budget_s: float, seed: int) -> Plan:
    """Ranges of groups with equal flops over all devices of the fastest kind, in their order.

    Where there are slower devices, the same with some of them or all behind or before the fast ones, flops in
    proportion to speed, or as many groups as fit on each before the next: the fastest of these. A group too large for
    any of the devices goes to the one with the most memory. Where a device would overflow, its range ends earlier.
    Groups that may not run on their device go to the one where they are fastest.

    Raises: PlacementError when nothing of this fits.
    """
    slowness_D = total_seconds(problem)
    ordered = sorted(range(problem.devices), key=lambda d: (slowness_D[d], d))
    first = sum(bool(slowness_D[d] <= ALIKE * slowness_D[ordered[0]]) for d in ordered)
    tried: list[tuple[float, float, int, Ints, str]] = []
    for count in range(first, problem.devices + 1):
        devices = sorted(ordered[:first]) + ordered[first:count]
        names = ", ".join(problem.device_names_D[d] for d in devices)
        for device_G, note in _by_hand(problem, devices, slowness_D[devices], alike=count == first):
            score = best_scored(problem, device_G)[1]
            tried.append((score.over_bytes, score.step_s, len(tried), device_G, f"{note} on {names}"))
    *_, device_G, note = min(tried, key=lambda t: t[:3])
    return finish(problem, device_G, "expert", note)


def _by_hand(
    problem: Problem, devices: Sequence[int], slowness_N: Floats, *, alike: bool
) -> Iterator[tuple[Ints, str]]:
    """The placements that a person tries on these devices, fast ones first, and what they are."""
    apart_G, order = _set_apart(problem, devices), pipeline_order(problem)
    order = order[apart_G[order] < 0]
    speed_N = 1 / np.maximum(slowness_N, 1e-300)
    share_N = np.full(len(devices), 1 / len(devices)) if alike else speed_N / speed_N.sum()
    how = "equal flops" if alike else "flops in proportion to speed"
    for few_open in (False, True):
        for row, where in ((order, ""), (order[::-1], " from the end")):
            if not few_open:
                yield _ranges(problem, row, devices, share_N, apart_G), how + where
            yield _ranges_that_fit(problem, row, devices, share_N, apart_G, few_open), f"{how}, if they fit,{where}"
            if alike:
                break
            all_N = np.ones(len(devices))
            yield _ranges_that_fit(problem, row, devices, all_N, apart_G, few_open), f"as many as fit{where}"


def _set_apart(problem: Problem, devices: Sequence[int]) -> Ints:
    """The device of each group that has no choice: it may run there only, or is too large for `devices`; others -1."""
    pinned_G, allowed_GD = pinned_devices(problem), tables(problem).allowed_GD
    outsized_G = problem.resident_bytes_G > problem.memory_bytes_D[devices].max()
    roomy_G = np.where(allowed_GD, problem.memory_bytes_D, -1.0).argmax(axis=1)
    return np.where((pinned_G < 0) & outsized_G, roomy_G, pinned_G)


def _ranges(problem: Problem, row: Ints, devices: Sequence[int], share_N: Floats, apart_G: Ints) -> Ints:
    """Cut the row of groups where the flops so far pass the sums of the shares."""
    done = np.cumsum(problem.flops_G[row]) - problem.flops_G[row] / 2
    total = max(float(problem.flops_G[row].sum()), 1e-300)
    number = np.minimum(np.searchsorted(np.cumsum(share_N), done / total, side="right"), len(devices) - 1)
    return _allowed(problem, row, np.array(devices)[number], apart_G)


def _ranges_that_fit(
    problem: Problem, row: Ints, devices: Sequence[int], share_N: Floats, apart_G: Ints, few_open: bool
) -> Ints:
    """The share of what is left on each device (1 for all of it), but no more than it holds.

    few_open: whether a device holds no more microbatches than there are devices (1F1B), or all.
    """
    chosen: list[int] = []
    for number, device in enumerate(devices):
        left, last = row[len(chosen) :], number + 1 == len(devices)
        members_GD = apart_G[:, None] == np.arange(problem.devices)
        part = 1.0 if share_N[number] == 1 else share_N[number] / share_N[number:].sum()
        quota, flops = problem.flops_G[left].sum() * part, 0.0
        for group in left:
            members_GD[group, device] = True
            needs_D = estimated_bytes(problem, members_GD, len(devices) - number if few_open else 0)
            over = needs_D[device] > problem.memory_bytes_D[device]
            if not last and (over or flops + problem.flops_G[group] / 2 > quota):
                break
            flops += problem.flops_G[group]
            chosen.append(device)
    return _allowed(problem, row, np.array(chosen, dtype=np.int64), apart_G)


def _allowed(problem: Problem, order: Ints, devices: Ints, apart_G: Ints) -> Ints:
    """The placement of the groups `order` on `devices`, each where it is fastest instead if it may not run there."""
    made, device_G = tables(problem), apart_G.copy()
    device_G[order] = devices
    barred = order[~made.allowed_GD[order, devices]]
    device_G[barred] = made.seconds_GD[barred].argmin(axis=1)
    return device_G
