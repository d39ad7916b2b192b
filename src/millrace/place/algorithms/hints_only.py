"""What the hints say, and everything else on one device."""

from __future__ import annotations

import numpy as np

from millrace.place.algorithms.finish import finish
from millrace.place.devices import pinned_devices, total_seconds
from millrace.place.memory import estimated_bytes
from millrace.place.problem import Plan, Problem
from millrace.place.tables import tables


def hints_only(problem: Problem, *, budget_s: float, seed: int) -> Plan:
    """Groups that may run on one device only go there; all others on one device, the fastest that holds them.

    A group that may not run on that device goes to the one where it is fastest. Raises: PlacementError when no device
    has the memory.
    """
    pinned_G, seconds_GD = pinned_devices(problem), tables(problem).seconds_GD
    allowed_GD = tables(problem).allowed_GD
    plans = []
    for home in np.argsort(total_seconds(problem), kind="stable").tolist():
        device_G = np.where(allowed_GD[:, home], home, seconds_GD.argmin(axis=1))
        device_G = np.where(pinned_G >= 0, pinned_G, device_G)
        members_GD = device_G[:, None] == np.arange(problem.devices)
        over_D = estimated_bytes(problem, members_GD) - problem.memory_bytes_D
        plans.append((float(np.maximum(over_D, 0.0).sum()), home, device_G))
    fitting = [plan for plan in plans if plan[0] == 0]
    _, home, device_G = fitting[0] if fitting else min(plans, key=lambda plan: plan[0])
    note = f"what no hint places is on {problem.device_names_D[home]}"
    return finish(problem, device_G, "hints_only", note)
