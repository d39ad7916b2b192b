"""The walk of `simulate.py`, as functions over arrays for `compiled.py`.

Letters: T tasks, P positions in the order (as many), K tensors, C uses, D devices, W wires, L transfers.
"""

# No postponed annotations: these functions have none that numba would have to read.

import numpy as np

from millrace.place.compiled import compiled


@compiled
def walk(  # type: ignore[no-untyped-def]
    limit_s,  # give up once the step is known to take longer
    load_s_D,  # what the tasks of each device take together
    order_P,
    position_T,
    device_T,
    seconds_TD,
    tail_s_T,  # the least time from the end of a task to the end of the step
    first_made_T1,
    made_K,
    bytes_K,
    wire_bytes_K,
    first_use_K1,
    uses_C,
    latency_s_DD,
    bytes_per_s_DD,
    wire_DD,
    ready_T,  # from here on: the state of the walk, zeros at its beginning
    end_P,
    hold_bytes_P,  # allocated by the start of the task at a position, and freed by its end
    free_bytes_P,
    state,  # [3 D + W] when each device is free, bytes ever allocated there, seconds of its tasks so far; free wires
    sent,  # [L, 4] target, end of the transfer, bytes, position of the last reader
    counts,  # [1] transfers so far
):
    """Walk all positions.

    Returns: the time of the last end, in seconds; infinite when that is certain to exceed `limit_s`.
    """
    devices = latency_s_DD.shape[0]
    arrival_D = np.zeros(devices)
    last_D = np.zeros(devices, dtype=np.int64)
    step_s = 0.0
    for position in range(len(order_P)):
        task = order_P[position]
        device = device_T[task]
        seconds = seconds_TD[task, device]
        end_s = max(state[device], ready_T[task]) + seconds
        state[2 * devices + device] += seconds
        on_s = max(tail_s_T[task], load_s_D[device] - state[2 * devices + device])
        if end_s + on_s > limit_s:
            return np.inf
        state[device] = end_s
        end_P[position] = end_s
        step_s = max(step_s, end_s)
        for made in range(first_made_T1[task], first_made_T1[task + 1]):
            tensor = made_K[made]
            size = bytes_K[tensor]
            hold_bytes_P[position] += size
            state[devices + device] += size
            last_D[device] = position
            reached = 1 << device
            first, stop = first_use_K1[tensor], first_use_K1[tensor + 1]
            for use in range(first, stop):
                reader = uses_C[use]
                target = device_T[reader]
                if not (reached >> target) & 1:
                    reached |= 1 << target
                    wire = wire_DD[device, target]
                    clock = device if wire < 0 else 3 * devices + wire
                    seconds = latency_s_DD[device, target] + wire_bytes_K[tensor] / bytes_per_s_DD[device, target]
                    arrival_D[target] = max(end_s, state[clock]) + seconds
                    state[clock] = arrival_D[target]
                    state[devices + target] += size
                    last_D[target] = position_T[reader]
                arrival_s = end_s if target == device else arrival_D[target]
                ready_T[reader] = max(ready_T[reader], arrival_s)
                last_D[target] = max(last_D[target], position_T[reader])
            free_bytes_P[last_D[device]] += size
            for target in range(devices):
                if target != device and (reached >> target) & 1:
                    count = counts[0]
                    sent[count, 0] = target
                    sent[count, 1] = arrival_D[target]
                    sent[count, 2] = size
                    sent[count, 3] = last_D[target]
                    counts[0] = count + 1
    return step_s


@compiled
def peak_bytes(  # type: ignore[no-untyped-def]
    order_P, device_T, scratch_bytes_T, resident_bytes_D, end_P, hold_bytes_P, free_bytes_P, sent, counts
):
    """The most memory of each device at a time, from the state that a walk leaves. Returns: [D]."""
    devices, tasks = len(resident_bytes_D), len(order_P)
    end_DN = np.empty((devices, tasks))
    position_DN = np.empty((devices, tasks), dtype=np.int64)
    count_D = np.zeros(devices, dtype=np.int64)
    for position in range(tasks):
        device = device_T[order_P[position]]
        end_DN[device, count_D[device]] = end_P[position]
        position_DN[device, count_D[device]] = position
        count_D[device] += 1
    arrived_P = np.zeros(tasks)
    freed_P = np.zeros(tasks)
    for number in range(counts[0]):
        target = int(sent[number, 0])
        last = int(sent[number, 3])
        low, high = 0, count_D[target]
        while low < high:
            middle = (low + high) // 2
            if end_DN[target, middle] > sent[number, 1]:
                high = middle
            else:
                low = middle + 1
        begin = last if low >= count_D[target] else min(position_DN[target, low], last)
        arrived_P[begin] += sent[number, 2]
        freed_P[last] += sent[number, 2]
    held_D = resident_bytes_D.copy()
    peak_D = resident_bytes_D.copy()
    for position in range(tasks):
        task = order_P[position]
        device = device_T[task]
        held_D[device] += hold_bytes_P[position] + arrived_P[position]
        peak_D[device] = max(peak_D[device], held_D[device] + scratch_bytes_T[task])
        held_D[device] -= free_bytes_P[position] + freed_P[position]
    return peak_D
