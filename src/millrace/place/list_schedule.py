"""Event-driven list scheduling of placed tasks, as a function over arrays for `compiled.py`.

Letters: T tasks, K tensors, D devices, M microbatches, W wires.
"""

# No postponed annotations: this function has none that numba would have to read.

import numpy as np

from millrace.place.compiled import compiled


@compiled
def _next_task(  # type: ignore[no-untyped-def]
    relaxed, device, available_DT, count_D, free_s, ready_T, rank_T, forward_T, microbatch_T, open_DM, opened_D, limit
):
    """The task that a device would begin next: where it stands among those available (-1: none), and its start."""
    full = not relaxed and opened_D[device] >= limit
    start, best, index = np.inf, -1, -1
    for i in range(count_D[device]):
        task = available_DT[device, i]
        if full and forward_T[task] and not open_DM[device, microbatch_T[task]]:
            continue
        possible = max(free_s, ready_T[task])
        if best < 0 or possible < start or (possible == start and rank_T[task] < rank_T[best]):
            start, best, index = possible, task, i
    return index, start


@compiled
def list_schedule(  # type: ignore[no-untyped-def]
    limit_s,  # give up once the step is known to take longer
    tail_s_T,  # the least time from the end of a task to the end of the step
    load_s_D,  # what the tasks of each device take together
    rank_T,  # the task with the lower number goes first
    forward_T,
    microbatch_T,  # 0, 1, 2, …
    open_limit_D,  # how many microbatches a device may have begun and not ended
    device_T,
    seconds_TD,
    first_made_T1,
    made_K,
    wire_bytes_K,
    first_use_K1,
    uses_C,
    unread_T,  # how many tensors each task reads
    latency_s_DD,
    bytes_per_s_DD,
    wire_DD,
):
    """Let every device run, whenever it is free, the first by rank of the tasks whose tensors are there.

    At every turn the device that can begin earliest begins: nothing that happens later can make an earlier beginning.
    A device at its limit of open microbatches begins no forward task of another one, unless no device can go on.

    Returns: the tasks in the order in which they begin, and when each of these ends; the last of these infinite when
    the step is certain to exceed `limit_s`.
    """
    tasks, devices = seconds_TD.shape
    microbatches = microbatch_T.max() + 1
    ready_T = np.zeros(tasks)
    waiting_T = unread_T.copy()
    available_DT = np.empty((devices, tasks), dtype=np.int64)
    count_D = np.zeros(devices, dtype=np.int64)
    free_D = np.zeros(devices)
    wire_free_W = np.zeros(wire_DD.max() + 2)
    arrival_D = np.zeros(devices)
    open_DM = np.zeros((devices, microbatches), dtype=np.bool_)
    left_DM = np.zeros((devices, microbatches), dtype=np.int64)
    opened_D = np.zeros(devices, dtype=np.int64)
    to_do_D = load_s_D.copy()
    # What a device would begin next changes only when it has begun something, or something of its has become available.
    changed_D = np.ones(devices, dtype=np.bool_)
    index_D = np.full(devices, -1, dtype=np.int64)
    start_D = np.full(devices, np.inf)
    for task in range(tasks):
        left_DM[device_T[task], microbatch_T[task]] += 1
        if waiting_T[task] == 0:
            device = device_T[task]
            available_DT[device, count_D[device]] = task
            count_D[device] += 1
    order = np.empty(tasks, dtype=np.int64)
    end_N = np.empty(tasks)
    states = (ready_T, rank_T, forward_T, microbatch_T, open_DM, opened_D)
    for number in range(tasks):
        device = -1
        for d in range(devices):
            if changed_D[d]:
                index_D[d], start_D[d] = _next_task(
                    False, d, available_DT, count_D, free_D[d], *states, open_limit_D[d]
                )
                changed_D[d] = False
            if index_D[d] >= 0 and (device < 0 or start_D[d] < start_D[device]):
                device = d
        if device < 0:  # all wait for a microbatch that their limits hold back
            for d in range(devices):
                index_D[d], start_D[d] = _next_task(True, d, available_DT, count_D, free_D[d], *states, open_limit_D[d])
                changed_D[d] = True
                if index_D[d] >= 0 and (device < 0 or start_D[d] < start_D[device]):
                    device = d
        task = available_DT[device, index_D[device]]
        microbatch = microbatch_T[task]
        end_s = start_D[device] + seconds_TD[task, device]
        to_do_D[device] -= seconds_TD[task, device]
        if end_s + max(tail_s_T[task], to_do_D[device]) > limit_s:
            end_N[-1] = np.inf
            return order, end_N
        changed_D[device] = True
        count_D[device] -= 1
        available_DT[device, index_D[device]] = available_DT[device, count_D[device]]
        if forward_T[task] and not open_DM[device, microbatch]:
            open_DM[device, microbatch] = True
            opened_D[device] += 1
        left_DM[device, microbatch] -= 1
        if left_DM[device, microbatch] == 0 and open_DM[device, microbatch]:
            opened_D[device] -= 1
        free_D[device] = end_s
        order[number] = task
        end_N[number] = end_s
        for made in range(first_made_T1[task], first_made_T1[task + 1]):
            tensor = made_K[made]
            reached = 1 << device
            for use in range(first_use_K1[tensor], first_use_K1[tensor + 1]):
                reader = uses_C[use]
                target = device_T[reader]
                if not (reached >> target) & 1:
                    reached |= 1 << target
                    wire = wire_DD[device, target]
                    seconds = latency_s_DD[device, target] + wire_bytes_K[tensor] / bytes_per_s_DD[device, target]
                    if wire < 0:  # the sender itself
                        arrival_D[target] = free_D[device] + seconds
                        free_D[device] = arrival_D[target]
                    else:
                        arrival_D[target] = max(end_s, wire_free_W[wire]) + seconds
                        wire_free_W[wire] = arrival_D[target]
                ready_T[reader] = max(ready_T[reader], end_s if target == device else arrival_D[target])
                waiting_T[reader] -= 1
                if waiting_T[reader] == 0:
                    available_DT[target, count_D[target]] = reader
                    count_D[target] += 1
                    changed_D[target] = True
    return order, end_N


@compiled
def longest_way(own_s_T, wire_s_C, first_made_T1, made_K, first_use_K1, uses_C):  # type: ignore[no-untyped-def]
    """The longest way from the start of each task to the end, given what tasks and uses of tensors take: [T]."""
    rank_T = own_s_T.copy()
    for task in range(len(own_s_T) - 1, -1, -1):
        on_s = 0.0
        for made in range(first_made_T1[task], first_made_T1[task + 1]):
            for use in range(first_use_K1[made_K[made]], first_use_K1[made_K[made] + 1]):
                on_s = max(on_s, wire_s_C[use] + rank_T[uses_C[use]])
        rank_T[task] += on_s
    return rank_T
