"""One group after the other to one device after the other."""

from __future__ import annotations

import numpy as np

from millrace.place.algorithms.finish import finish
from millrace.place.devices import pinned_devices, pipeline_order
from millrace.place.problem import Plan, Problem
from millrace.place.tables import tables


def round_robin(problem: Problem, *, budget_s: float, seed: int) -> Plan:
    """Deal the groups out in the order of the forward pass, past devices where they may not run or that are full.

    Raises: PlacementError when the plan does not fit.
    """
    device_G, allowed_GD = pinned_devices(problem), tables(problem).allowed_GD
    free_D = problem.memory_bytes_D.copy()
    np.subtract.at(free_D, device_G[device_G >= 0], problem.resident_bytes_G[device_G >= 0])
    turn = 0
    for group in pipeline_order(problem):
        if device_G[group] < 0:
            around = (turn + np.arange(problem.devices)) % problem.devices
            possible = around[allowed_GD[group, around]]
            room = possible[free_D[possible] >= problem.resident_bytes_G[group]]
            device_G[group] = room[0] if len(room) else possible[np.argmax(free_D[possible])]
            free_D[device_G[group]] -= problem.resident_bytes_G[group]
            turn = int(device_G[group]) + 1
    return finish(problem, device_G, "round_robin", f"{problem.groups} groups dealt out")
