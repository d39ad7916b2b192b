"""What a careful person does by hand: equal shares of the layers, in order, on the fast devices."""

from __future__ import annotations

import numpy as np

from millrace.place.algorithms.finish import finish
from millrace.place.devices import pinned_devices, pipeline_order, total_seconds
from millrace.place.memory import estimated_bytes
from millrace.place.order import best_scored
from millrace.place.problem import Ints, Plan, Problem
from millrace.place.tables import tables

_ALIKE = 1.05  # devices of one kind, when measured, differ by less


def expert(problem: Problem, *, budget_s: float, seed: int) -> Plan:
    """Ranges of groups with equal flops over all devices of the fastest kind, in their order.

    A group too large for any of these goes to the device with the most memory. Where a device would overflow, its range
    ends earlier. Where that is not enough, devices of the next kind come in, after the others. Groups that may not run
    on their device go to the one where they are fastest.

    Raises: PlacementError when nothing of this fits.
    """
    speed_D = total_seconds(problem)
    ordered = sorted(range(problem.devices), key=lambda d: (speed_D[d], d))
    first = sum(bool(speed_D[d] <= _ALIKE * speed_D[ordered[0]]) for d in ordered)
    tried: list[tuple[float, float, Ints, str]] = []
    for count in range(first, problem.devices + 1):
        devices = sorted(ordered[:first]) + ordered[first:count]
        apart_G = _set_apart(problem, devices)
        for device_G in (_equal_ranges(problem, devices, apart_G), _ranges_that_fit(problem, devices, apart_G)):
            score = best_scored(problem, device_G)[1]
            note = f"equal flops on {', '.join(problem.device_names_D[d] for d in devices)}"
            tried.append((score.over_bytes, score.step_s, device_G, note))
            if score.over_bytes == 0:
                return finish(problem, device_G, "expert", note)
    _, _, device_G, note = min(tried, key=lambda t: t[:2])
    return finish(problem, device_G, "expert", note)


def _set_apart(problem: Problem, devices: list[int]) -> Ints:
    """The device of each group that has no choice: it may run there only, or is too large for `devices`; others -1."""
    pinned_G, allowed_GD = pinned_devices(problem), tables(problem).allowed_GD
    outsized_G = problem.resident_bytes_G > problem.memory_bytes_D[devices].max()
    roomy_G = np.where(allowed_GD, problem.memory_bytes_D, -1.0).argmax(axis=1)
    return np.where((pinned_G < 0) & outsized_G, roomy_G, pinned_G)


def _equal_ranges(problem: Problem, devices: list[int], apart_G: Ints) -> Ints:
    """Cut the forward order where the flops so far pass equal shares."""
    order = pipeline_order(problem)
    order = order[apart_G[order] < 0]
    done = np.cumsum(problem.flops_G[order]) - problem.flops_G[order] / 2
    total = max(float(problem.flops_G[order].sum()), 1e-300)
    share = np.minimum((done / total * len(devices)).astype(np.int64), len(devices) - 1)
    return _allowed(problem, order, np.array(devices)[share], apart_G)


def _ranges_that_fit(problem: Problem, devices: list[int], apart_G: Ints) -> Ints:
    """Equal flops of what is left on each device, but no more than it holds."""
    order = pipeline_order(problem)
    order = order[apart_G[order] < 0]
    chosen: list[int] = []
    for number, device in enumerate(devices):
        left, last = order[len(chosen) :], number + 1 == len(devices)
        members_GD = apart_G[:, None] == np.arange(problem.devices)
        quota, flops = problem.flops_G[left].sum() / (len(devices) - number), 0.0
        for group in left:
            members_GD[group, device] = True
            over = estimated_bytes(problem, members_GD)[device] > problem.memory_bytes_D[device]
            if not last and (over or flops + problem.flops_G[group] / 2 > quota):
                break
            flops += problem.flops_G[group]
            chosen.append(device)
    return _allowed(problem, order, np.array(chosen, dtype=np.int64), apart_G)


def _allowed(problem: Problem, order: Ints, devices: Ints, apart_G: Ints) -> Ints:
    """The placement of the groups `order` on `devices`, each where it is fastest instead if it may not run there."""
    made, device_G = tables(problem), apart_G.copy()
    device_G[order] = devices
    barred = order[~made.allowed_GD[order, devices]]
    device_G[barred] = made.seconds_GD[barred].argmin(axis=1)
    return device_G
