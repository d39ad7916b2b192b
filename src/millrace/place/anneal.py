"""Simulated annealing of placement and order together, as a function over arrays for `compiled.py`.

Letters as in `walk.py`; G groups, N trials.
"""

# No postponed annotations: these functions have none that numba would have to read.

import numpy as np

from millrace.place.compiled import compiled
from millrace.place.walk import peak_bytes, walk

MOST_MOVED = 8  # groups that one change moves


@compiled
def draw_groups(  # type: ignore[no-untyped-def]
    kind,
    where,
    which,
    length,
    device_G,
    moved,
    target,
    movable,
    first_allowed_G1,
    allowed,
    allowed_GD,
    first_near_G1,
    near,
    row_G,
    place_G,
):
    """Write groups to move and their new devices. Returns: how many; none when the draw changes nothing."""
    count = 0
    g = movable[int(where * len(movable))]
    if kind < 0.35:
        choice = first_allowed_G1[g] + int(which * (first_allowed_G1[g + 1] - first_allowed_G1[g]))
        moved[0], target[0], count = g, allowed[choice], 1
    elif kind < 0.55:
        other = movable[int(which * len(movable))]
        moved[0], target[0], moved[1], target[1], count = g, device_G[other], other, device_G[g], 2
    elif kind < 0.75:
        choices = first_near_G1[g + 1] - first_near_G1[g]
        if choices > 0:
            moved[0], target[0], count = g, device_G[near[first_near_G1[g] + int(which * choices)]], 1
    else:
        first = place_G[g]
        run = min(1 + int(length * MOST_MOVED), len(device_G) - first)
        edge = first - 1 if which < 0.2 else first + run if which < 0.4 else -1
        device = -1 if which < 0.4 else int((which - 0.4) / 0.6 * allowed_GD.shape[1])
        if edge >= 0 and edge < len(device_G):
            device = device_G[row_G[edge]]
        if device >= 0:
            for i in range(run):
                moved[i], target[i] = row_G[first + i], device
            count = run
    changes = 0
    for i in range(count):
        if target[i] != device_G[moved[i]] and allowed_GD[moved[i], target[i]]:
            moved[changes], target[changes] = moved[i], target[i]
            changes += 1
    return changes


@compiled
def _draw_place(  # type: ignore[no-untyped-def]
    begin,
    which,
    length,
    order_P,
    position_T,
    first_read_T1,
    read_X,
    producer_K,
    first_made_T1,
    made_K,
    first_use_K1,
    uses_C,
):
    """Returns: where the task at a position may go, between what it needs and what needs it."""
    task = order_P[begin]
    if which < 0.5:
        first = 0
        for read in range(first_read_T1[task], first_read_T1[task + 1]):
            first = max(first, position_T[producer_K[read_X[read]]] + 1)
        return begin - int(length * length * (begin - first + 1))
    last = len(order_P) - 1
    for made in range(first_made_T1[task], first_made_T1[task + 1]):
        for use in range(first_use_K1[made_K[made]], first_use_K1[made_K[made] + 1]):
            last = min(last, position_T[uses_C[use]] - 1)
    return begin + int(length * length * (last - begin + 1))


@compiled
def put_groups(  # type: ignore[no-untyped-def]
    moved, target, device_G, device_T, load_D, resident_D, first_task_G1, tasks_T, seconds_GD, resident_bytes_G
):
    """Move groups; `target` then says where they were."""
    for i, g in enumerate(moved):
        before, now = device_G[g], target[i]
        device_G[g], target[i] = now, before
        for t in range(first_task_G1[g], first_task_G1[g + 1]):
            device_T[tasks_T[t]] = now
        load_D[before] -= seconds_GD[g, before]
        load_D[now] += seconds_GD[g, now]
        resident_D[before] -= resident_bytes_G[g]
        resident_D[now] += resident_bytes_G[g]


@compiled
def _shift(begin, end, order_P, position_T):  # type: ignore[no-untyped-def]
    """Move the task at one position to another; those between make room."""
    task = order_P[begin]
    step = 1 if end > begin else -1
    for position in range(begin, end, step):
        order_P[position] = order_P[position + step]
        position_T[order_P[position]] = position
    order_P[end] = task
    position_T[task] = end


@compiled
def anneal(  # type: ignore[no-untyped-def]
    draws_N5,  # uniform random numbers for each trial
    hot_s,
    cold_s,
    over_price,  # what a byte too much multiplies the time of a step by, less one
    order_share,  # of the trials that change the order alone
    device_G,  # from here: where to begin; what is returned of them is where it ends
    order_P,
    best_device_G,  # the best is left here
    best_order_P,
    movable,  # groups with a choice
    first_allowed_G1,
    allowed,
    allowed_GD,
    first_near_G1,  # the groups that exchange tensors with each
    near,
    row_G,  # groups in forward order, and where each stands there
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
    """Try changes while the temperature falls from hot to cold.

    A change moves a group, exchanges two, moves a group to one that it exchanges tensors with, moves a run of groups
    to the device of the group before or after it, or moves a task within the order as far as its tensors allow. What a
    trial may take is drawn before it is walked, so that the walk can end as soon as it takes longer.

    Returns: seconds and lacking bytes of the best.
    """
    groups, tasks, devices = len(device_G), len(order_P), len(memory_bytes_D)
    device_T = device_G[group_T]
    position_T = np.empty(tasks, dtype=np.int64)
    position_T[order_P] = np.arange(tasks)
    load_D = np.zeros(devices)
    resident_D = np.zeros(devices)
    for g in range(groups):
        load_D[device_G[g]] += seconds_GD[g, device_G[g]]
        resident_D[device_G[g]] += resident_bytes_G[g]
    scratch = scratch_bytes_T.max()
    ready_T, end_P, hold_P, free_P = np.zeros(tasks), np.zeros(tasks), np.zeros(tasks), np.zeros(tasks)
    state = np.zeros(3 * devices + wire_DD.max() + 1)
    sent = np.zeros((len(producer_K) * max(devices - 1, 1), 4))
    counts = np.zeros(1, dtype=np.int64)
    placed = (device_G, device_T, load_D, resident_D, first_task_G1, tasks_T, seconds_GD, resident_bytes_G)
    moved = np.zeros(MOST_MOVED, dtype=np.int64)
    target = np.zeros(MOST_MOVED, dtype=np.int64)
    now = np.inf
    best_s, best_over = np.inf, np.inf
    trials = len(draws_N5)
    for number in range(-1, trials):
        temperature_s = hot_s * (cold_s / hot_s) ** (max(number, 0) / trials)
        count, begin, end = 0, 0, 0
        limit_s = np.inf
        if number >= 0:
            kind, where, which, length, chance = draws_N5[number]
            limit_s = now - temperature_s * np.log(chance + 1e-300)
            if kind < order_share:
                begin = int(where * tasks)
                reads, makes = (first_read_T1, read_X, producer_K), (first_made_T1, made_K, first_use_K1, uses_C)
                end = _draw_place(begin, which, length, order_P, position_T, *reads, *makes)
            else:
                kind = (kind - order_share) / (1 - order_share)
                choices = (movable, first_allowed_G1, allowed, allowed_GD, first_near_G1, near, row_G, place_G)
                count = draw_groups(kind, where, which, length, device_G, moved, target, *choices)
            if count == 0 and begin == end:
                continue
        put_groups(moved[:count], target, *placed)
        _shift(begin, end, order_P, position_T)
        ready_T[:], hold_P[:], free_P[:], state[:], counts[0] = 0.0, 0.0, 0.0, 0.0, 0
        arrays = (ready_T, end_P, hold_P, free_P, state, sent, counts)
        made_arrays = (seconds_TD, tail_s_T, first_made_T1, made_K, bytes_K, wire_bytes_K, first_use_K1, uses_C)
        links = (latency_s_DD, bytes_per_s_DD, wire_DD)
        step_s = walk(limit_s * (1 + 1e-9), load_D, order_P, position_T, device_T, *made_arrays, *links, *arrays)
        over = 0.0
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
            _shift(end, begin, order_P, position_T)
            put_groups(moved[:count], target, *placed)
    return best_s, best_over
