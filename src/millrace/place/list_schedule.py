"""Event-driven list scheduling of placed tasks, as a function over arrays for `compiled.py`.

Letters: T tasks, K tensors, D devices, M microbatches, W wires.
"""

# No postponed annotations: this function has none that numba would have to read.

import numpy as np

from millrace.place.compiled import compiled


@compiled
def list_schedule(  # type: ignore[no-untyped-def]
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

    Returns: the tasks in the order in which they begin, and when each of these ends.
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
    for task in range(tasks):
        left_DM[device_T[task], microbatch_T[task]] += 1
        if waiting_T[task] == 0:
            device = device_T[task]
            available_DT[device, count_D[device]] = task
            count_D[device] += 1
    order = np.empty(tasks, dtype=np.int64)
    end_N = np.empty(tasks)
    for number in range(tasks):
        chosen, chosen_device, chosen_index, chosen_start = -1, -1, -1, np.inf
        for relaxed in range(2):
            for device in range(devices):
                full = relaxed == 0 and opened_D[device] >= open_limit_D[device]
                start, best, index = np.inf, -1, -1
                for i in range(count_D[device]):
                    task = available_DT[device, i]
                    if full and forward_T[task] and not open_DM[device, microbatch_T[task]]:
                        continue
                    possible = max(free_D[device], ready_T[task])
                    if best < 0 or possible < start or (possible == start and rank_T[task] < rank_T[best]):
                        start, best, index = possible, task, i
                if best >= 0 and (chosen < 0 or start < chosen_start):
                    chosen, chosen_device, chosen_index, chosen_start = best, device, index, start
            if chosen >= 0:
                break
        task, device, microbatch = chosen, chosen_device, microbatch_T[chosen]
        count_D[device] -= 1
        available_DT[device, chosen_index] = available_DT[device, count_D[device]]
        if forward_T[task] and not open_DM[device, microbatch]:
            open_DM[device, microbatch] = True
            opened_D[device] += 1
        left_DM[device, microbatch] -= 1
        if left_DM[device, microbatch] == 0 and open_DM[device, microbatch]:
            opened_D[device] -= 1
        end_s = chosen_start + seconds_TD[task, device]
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
                    arrival_D[target] = max(end_s, wire_free_W[wire]) + seconds
                    wire_free_W[wire] = arrival_D[target]
                ready_T[reader] = max(ready_T[reader], end_s if target == device else arrival_D[target])
                waiting_T[reader] -= 1
                if waiting_T[reader] == 0:
                    available_DT[target, count_D[target]] = reader
                    count_D[target] += 1
    return order, end_N
