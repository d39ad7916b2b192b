"""Simulated annealing of the placement alone, each placement in an order of its own, for `compiled.py`.

`anneal.py` keeps the order while groups move, which is quicker and fits an order to a placement. A pipeline of many
microbatches needs another order as soon as its stages change: here every placement is list-scheduled anew.

Letters as in `walk.py`; G groups, N trials.
"""

# No postponed annotations: these functions have none that numba would have to read.

import numpy as np

from millrace.place.anneal import MOST_MOVED, draw_groups, put_groups
from millrace.place.compiled import compiled
from millrace.place.list_schedule import list_schedule
from millrace.place.walk import peak_bytes, walk


@compiled
def _open_limits(extra, device_G, row_G, limit_D):  # type: ignore[no-untyped-def]
    """How many microbatches each device may hold: as many as devices follow in the pipeline, and `extra` more."""
    devices = len(limit_D)
    limit_D[:] = np.iinfo(np.int64).max
    if extra < 0:
        return
    used = 0
    for d in range(devices):
        limit_D[d] = 0
    for g in row_G:
        if limit_D[device_G[g]] == 0:
            used += 1
            limit_D[device_G[g]] = used
    for d in range(devices):
        limit_D[d] = used - limit_D[d] + 1 + extra if limit_D[d] > 0 else 1


@compiled
def anneal_placements(  # type: ignore[no-untyped-def]
    draws_N5,  # uniform random numbers for each trial
    hot_s,
    cold_s,
    over_price,  # what a byte too much multiplies the time of a step by, less one
    extra,  # of open microbatches, see `_open_limits`; -1 for any number
    rank_T,  # which task goes first
    forward_T,
    open_T,  # microbatches, with one more for what belongs to none
    device_G,  # from here: where to begin; what is returned of it is where it ends
    best_device_G,  # the best is left here
    best_order_P,
    movable,  # from here: as for `anneal`
    first_allowed_G1,
    allowed,
    allowed_GD,
    first_near_G1,
    near,
    row_G,
    place_G,
    first_task_G1,
    tasks_T,
    seconds_GD,
    resident_bytes_G,
    memory_bytes_D,
    group_T,
    scratch_bytes_T,
    first_read_T1,
    read_X,
    producer_K,
    seconds_TD,
    tail_s_T,
    first_made_T1,
    made_K,
    bytes_K,
    wire_bytes_K,
    first_use_K1,
    uses_C,
    latency_s_DD,
    bytes_per_s_DD,
    wire_DD,
):
    """Move groups as `anneal` does, and schedule all tasks anew, while the temperature falls from hot to cold.

    Returns: seconds and lacking bytes of the best.
    """
    tasks, devices = len(group_T), len(memory_bytes_D)
    device_T = device_G[group_T]
    unread_T = first_read_T1[1:] - first_read_T1[:-1]
    load_D, resident_D = np.zeros(devices), np.zeros(devices)
    for g in range(len(device_G)):
        load_D[device_G[g]] += seconds_GD[g, device_G[g]]
        resident_D[device_G[g]] += resident_bytes_G[g]
    scratch = scratch_bytes_T.max()
    limit_D = np.zeros(devices, dtype=np.int64)
    position_T = np.empty(tasks, dtype=np.int64)
    ready_T, end_P, hold_P, free_P = np.zeros(tasks), np.zeros(tasks), np.zeros(tasks), np.zeros(tasks)
    state = np.zeros(3 * devices + wire_DD.max() + 1)
    sent = np.zeros((len(producer_K) * max(devices - 1, 1), 4))
    counts = np.zeros(1, dtype=np.int64)
    placed = (device_G, device_T, load_D, resident_D, first_task_G1, tasks_T, seconds_GD, resident_bytes_G)
    choices = (movable, first_allowed_G1, allowed, allowed_GD, first_near_G1, near, row_G, place_G)
    made_arrays = (first_made_T1, made_K, bytes_K, wire_bytes_K, first_use_K1, uses_C)
    sent_arrays = (first_made_T1, made_K, wire_bytes_K, first_use_K1, uses_C)
    links = (latency_s_DD, bytes_per_s_DD, wire_DD)
    moved, target = np.zeros(MOST_MOVED, dtype=np.int64), np.zeros(MOST_MOVED, dtype=np.int64)
    now, best_s, best_over = np.inf, np.inf, np.inf
    trials = len(draws_N5)
    for number in range(-1, trials):
        temperature_s = hot_s * (cold_s / hot_s) ** (max(number, 0) / trials)
        count, limit_s = 0, np.inf
        if number >= 0:
            kind, where, which, length, chance = draws_N5[number]
            limit_s = now - temperature_s * np.log(chance + 1e-300)
            count = draw_groups(kind, where, which, length, device_G, moved, target, *choices)
            if count == 0:
                continue
        put_groups(moved[:count], target, *placed)
        cost, step_s, over = np.inf, np.inf, 0.0
        order_P = best_order_P
        if load_D.max() <= limit_s:
            _open_limits(extra, device_G, row_G, limit_D)
            some = limit_s * (1 + 1e-9)
            keys = (rank_T, forward_T, open_T, limit_D, device_T, seconds_TD)
            order, ends = list_schedule(some, tail_s_T, load_D, *keys, *sent_arrays, unread_T, *links)
            if ends[-1] < np.inf:
                order_P = order[np.argsort(ends, kind="mergesort")]
                position_T[order_P] = np.arange(tasks)
                ready_T[:], hold_P[:], free_P[:], state[:], counts[0] = 0.0, 0.0, 0.0, 0.0, 0
                arrays = (ready_T, end_P, hold_P, free_P, state, sent, counts)
                timed = (seconds_TD, tail_s_T)
                step_s = walk(some, load_D, order_P, position_T, device_T, *timed, *made_arrays, *links, *arrays)
        if step_s < np.inf:
            tight = False
            for device in range(devices):
                tight |= resident_D[device] + state[devices + device] + scratch > memory_bytes_D[device]
            if tight:
                peak_D = peak_bytes(order_P, device_T, scratch_bytes_T, resident_D, end_P, hold_P, free_P, sent, counts)
                over = np.maximum(peak_D - memory_bytes_D, 0.0).sum()
            cost = step_s * (1 + over_price * over)
        if cost <= limit_s:
            now = cost
            if over < best_over or (over == best_over and step_s < best_s):
                best_s, best_over = step_s, over
                best_device_G[:] = device_G
                best_order_P[:] = order_P
        else:
            put_groups(moved[:count], target, *placed)
    return best_s, best_over
