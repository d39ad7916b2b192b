"""A time that no placement and no order can beat, for problems too large for the integer program."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog

from millrace.place.evaluate import least_seconds_after
from millrace.place.problem import Problem
from millrace.place.tables import tables


def lower_bound_s(problem: Problem) -> float:
    """The greatest of two bounds of a step, in seconds.

    The longest way through the tasks with each on its fastest device and nothing to transfer; and the busiest device
    when groups may be divided at will over all devices whose memory holds the variables (a linear program).
    """
    fastest_T = problem.seconds_TD.min(axis=1)
    way_s = float((fastest_T + least_seconds_after(problem)).max(initial=0.0))
    made = tables(problem)
    G, D = problem.groups, problem.devices
    seconds_GD = np.where(made.allowed_GD, made.seconds_GD, 0.0)
    unit_s = max(float(seconds_GD.max()), 1e-300)
    rows, limits = np.zeros((2 * D, G * D + 1)), np.zeros(2 * D)
    for d in range(D):
        rows[d, d : G * D : D], rows[d, -1] = seconds_GD[:, d] / unit_s, -1.0
        rows[D + d, d : G * D : D] = problem.resident_bytes_G / problem.memory_bytes_D[d]
        limits[D + d] = 1.0
    whole = np.zeros((G, G * D + 1))
    for g in range(G):
        whole[g, g * D : (g + 1) * D] = 1.0
    objective = np.zeros(G * D + 1)
    objective[-1] = 1.0
    bounds = [(0.0, float(allowed)) for allowed in made.allowed_GD.ravel()] + [(0.0, None)]
    found = linprog(objective, A_ub=rows, b_ub=limits, A_eq=whole, b_eq=np.ones(G), bounds=bounds)
    return max(way_s, float(found.fun) * unit_s) if found.status == 0 else way_s
