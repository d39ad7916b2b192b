"""Heterogeneous earliest finish time, for groups.

Source: Topcuoglu, Hariri, Wu 2002, "Performance-effective and low-complexity task scheduling for heterogeneous
computing". Devices without memory for a group are left out, as in Jeon et al. 2020 (Baechi, m-ETF).
"""

from __future__ import annotations

import numpy as np

from millrace.place.algorithms.finish import finish
from millrace.place.devices import pinned_devices
from millrace.place.order import longest_way
from millrace.place.problem import Floats, Ints, Plan, Problem
from millrace.place.tables import FORWARD, tables


def heft(problem: Problem, *, budget_s: float, seed: int) -> Plan:
    """Groups by falling upward rank, each to the device where its forward tasks end earliest, transfers included.

    The backward pass mirrors the forward pass, so what ends early in one does in the other. The order of all tasks is
    found afterwards, for the whole placement.

    Raises: PlacementError when the plan does not fit.
    """
    pinned_devices(problem)
    made = tables(problem)
    rank_T = mean_rank(problem)
    first_G = np.full(problem.groups, -np.inf)
    np.maximum.at(first_G, problem.group_T, rank_T)
    device_G = np.full(problem.groups, -1, dtype=np.int64)
    free_s_D, end_T = np.zeros(problem.devices), np.zeros(problem.tasks)
    room_D = problem.memory_bytes_D - made.working_bytes_G.max(initial=0.0)
    needs_G = problem.resident_bytes_G + made.microbatches * made.held_bytes_G
    for group in np.argsort(-first_G, kind="stable"):
        tasks = made.tasks_of(group)
        forward = tasks[made.phase_T[tasks] == FORWARD]
        possible = np.flatnonzero(made.allowed_GD[group])
        fitting = possible[room_D[possible] >= needs_G[group]]
        if not len(fitting):
            fitting = possible[[np.argmax(room_D[possible])]]
        ends = [_ends(problem, forward, int(d), device_G, end_T, free_s_D[d]) for d in fitting]
        # Where nothing runs in the forward pass (an update on its own), the fastest device with room is the best.
        seconds = [
            (float(e[-1]) if len(e) else 0.0, made.seconds_GD[group, d]) for e, d in zip(ends, fitting, strict=True)
        ]
        best = min(range(len(fitting)), key=seconds.__getitem__)
        device = int(fitting[best])
        device_G[group] = device
        room_D[device] -= needs_G[group]
        end_T[forward] = ends[best]
        if len(forward):
            free_s_D[device] = ends[best][-1]
    return finish(problem, device_G, "heft", "groups where they end earliest")


def mean_rank(problem: Problem) -> Floats:
    """Upward rank with mean costs over the devices and pairs of devices (equation 8): [T]."""
    finite_TD = np.where(np.isfinite(problem.seconds_TD), problem.seconds_TD, np.nan)
    apart = ~np.eye(problem.devices, dtype=bool)
    per_byte = float((1 / problem.bytes_per_s_DD[apart]).mean()) if problem.devices > 1 else 0.0
    latency = float(problem.latency_s_DD[apart].mean()) if problem.devices > 1 else 0.0
    bytes_C = np.repeat(problem.wire_bytes_K, np.diff(problem.first_use_K1))
    source_G = problem.group_T[np.repeat(problem.producer_K, np.diff(problem.first_use_K1))]
    between_C = source_G != problem.group_T[problem.uses_C]
    return longest_way(problem, np.nanmean(finite_TD, axis=1), between_C * (latency + bytes_C * per_byte))


def _ends(problem: Problem, tasks: Ints, device: int, device_G: Ints, end_T: Floats, free_s: float) -> Floats:
    """When the forward tasks of a group would end on a device, one after the other."""
    made = tables(problem)
    own: dict[int, float] = {}
    for task in tasks.tolist():
        start_s = free_s
        for tensor in made.read_by(task).tolist():
            producer = int(problem.producer_K[tensor])
            source = int(device_G[problem.group_T[producer]])
            arrival_s = own.get(producer, float(end_T[producer]))
            if source not in (-1, device):
                wire_s = (
                    problem.latency_s_DD[source, device]
                    + problem.wire_bytes_K[tensor] / problem.bytes_per_s_DD[source, device]
                )
                arrival_s += float(wire_s)
            start_s = max(start_s, arrival_s)
        own[task] = free_s = start_s + float(problem.seconds_TD[task, device])
    return np.array(list(own.values()))
