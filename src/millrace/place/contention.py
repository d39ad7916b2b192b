"""Devices that slow each other down: the workers of one host share its memory, caches and clock.

A search counts every task at the pace of a host whose devices all work. What a plan will really take lies between that
and the pace of a device that works alone, by how much of its time the others work, too.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from millrace.place.problem import Floats, Plan, Problem
from millrace.place.simulate import Simulated, simulate

_ROUNDS, _STEP = 8, 0.6  # a whole step to the new times would swing to and fro


def expect(problem: Problem, plan: Plan) -> Simulated:
    """What a plan comes to, with each task at the pace that its company leaves it.

    When tasks run decides how long they take, and that decides when they run: so it is found by a few rounds from the
    pace of busy hosts. Raises: PlacementError as `simulate`.
    """
    found = simulate(problem, plan)
    if problem.alone_s_TD is None:
        return found
    every = np.arange(problem.tasks)
    device_T = plan.device_G[problem.group_T]
    busy_s_T, alone_s_T = problem.seconds_TD[every, device_T], problem.alone_s_TD[every, device_T]
    seconds_TD = problem.seconds_TD.copy()
    for _ in range(_ROUNDS):
        share_T = _share_of_others(problem, plan, found)
        with np.errstate(divide="ignore", invalid="ignore"):
            pace_T = share_T / busy_s_T + (1.0 - share_T) / alone_s_T
            new_s_T = np.where(busy_s_T > 0.0, 1.0 / pace_T, 0.0)
        seconds_TD[every, device_T] = (1.0 - _STEP) * seconds_TD[every, device_T] + _STEP * new_s_T
        found = simulate(replace(problem, seconds_TD=seconds_TD), plan)
    return found


def _share_of_others(problem: Problem, plan: Plan, found: Simulated) -> Floats:
    """How much of each task's time the other devices of its host work, in the mean over them: [T] from 0 to 1."""
    device_T = plan.device_G[problem.group_T]
    share_T, others_T = np.zeros(problem.tasks), np.zeros(problem.tasks)
    for device in range(problem.devices):
        own = plan.order_T[device_T[plan.order_T] == device]
        times = np.stack([found.start_s_T[own], found.end_s_T[own]], axis=1).ravel()
        worked = np.cumsum(np.stack([np.zeros(len(own)), found.end_s_T[own] - found.start_s_T[own]], axis=1).ravel())
        beside_T = (problem.host_D[device_T] == problem.host_D[device]) & (device_T != device)
        others_T += beside_T
        if len(own):
            # `worked` at the start of a task is what the device has worked before it, at its end that and the task.
            before_T, after_T = (np.interp(at_T, times, worked) for at_T in (found.start_s_T, found.end_s_T))
            share_T += np.where(beside_T, after_T - before_T, 0.0)
    taken_T = (found.end_s_T - found.start_s_T) * np.maximum(others_T, 1)
    return np.divide(share_T, taken_T, out=np.zeros(problem.tasks), where=taken_T > 0.0).clip(0.0, 1.0)
