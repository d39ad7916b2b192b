"""What a plan comes to: when every task and transfer begins and ends, and how much memory each device needs.

The plain statement of the model; `evaluate.py` gets the same numbers faster. The tasks are walked in the order of the
plan. A task begins when its device has ended the task before it and when all tensors that it reads are there. A tensor
is sent once to each other device that has a reader, as soon as its producer has ended, and while devices compute; where
there is no wire but the sender itself, the sender runs no other task until it has sent. Each wire serves transfers in
the order in which the walk meets their producers (for one producer: by the number of the tensor, then by its first
reader on the target in `uses_C`), so an order sorted by the ends of tasks is the order in which they are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from millrace.errors import PlacementError
from millrace.place.problem import Floats, Ints, Plan, Problem
from millrace.place.tables import tables, transfer_seconds


@dataclass(frozen=True)
class Transfer:
    """One tensor on its way to one device."""

    tensor: int
    source: int
    target: int
    start_s: float
    end_s: float
    size_bytes: float


@dataclass(frozen=True, eq=False)
class Simulated:
    """A step under a plan; D devices, T tasks."""

    step_s: float
    start_s_T: Floats
    end_s_T: Floats
    busy_s_D: Floats
    peak_bytes_D: Floats  # resident variables included
    over_bytes_D: Floats  # what the peak exceeds the memory of the device by
    transfers: tuple[Transfer, ...]
    bytes_DD: Floats  # sent from one device to another

    @property
    def fits(self) -> bool:
        """Whether every device has the memory that it needs."""
        return not self.over_bytes_D.any()

    @property
    def over_bytes(self) -> float:
        """What all devices lack in memory."""
        return float(self.over_bytes_D.sum())


def simulate(problem: Problem, plan: Plan) -> Simulated:
    """Run a plan in thought.

    Memory: a tensor is counted on the device that made it from the start of its task, and on another one from the end
    of its transfer, until the last task there that reads it has ended (its own task, where none does); scratch is
    counted while its task runs.

    Returns: times in seconds from the start of the step; a step that runs a task where it may not takes infinitely
    long. Raises: PlacementError when the plan does not place every group on a device, or its order does not hold every
    task once and after those whose tensors it reads.
    """
    check_plan(problem, plan)
    device_T = plan.device_G[problem.group_T]
    start_T, end_T = np.zeros(problem.tasks), np.zeros(problem.tasks)
    ready_T = np.zeros(problem.tasks)
    free_D = np.zeros(problem.devices)
    wire_free = np.zeros(int(problem.wire_DD.max(initial=-1)) + 1)
    transfers: list[Transfer] = []
    for task in plan.order_T:
        device = device_T[task]
        start_T[task] = max(free_D[device], ready_T[task])
        end_T[task] = free_D[device] = start_T[task] + problem.seconds_TD[task, device]
        for tensor in tables(problem).made_by(task):
            arrival = {device: end_T[task]}
            for reader in readers(problem, tensor):
                target = device_T[reader]
                if target not in arrival:
                    wire = problem.wire_DD[device, target]
                    begun = free_D[device] if wire < 0 else max(end_T[task], wire_free[wire])
                    size = float(problem.wire_bytes_K[tensor])
                    arrival[target] = begun + transfer_seconds(problem, size, device, int(target))
                    if wire < 0:
                        free_D[device] = arrival[target]
                    else:
                        wire_free[wire] = arrival[target]
                    ends = float(begun), float(arrival[target])
                    transfers.append(Transfer(int(tensor), int(device), int(target), *ends, size))
                ready_T[reader] = max(ready_T[reader], arrival[target])
    own_s_T = problem.seconds_TD[np.arange(problem.tasks), device_T]
    busy_D = np.bincount(device_T, own_s_T, problem.devices).astype(np.float64)
    peak_D = _peak_bytes(problem, plan, end_T, transfers)
    bytes_DD = np.zeros((problem.devices, problem.devices))
    for transfer in transfers:
        bytes_DD[transfer.source, transfer.target] += transfer.size_bytes
    return Simulated(
        step_s=float(end_T.max(initial=0.0)),
        start_s_T=start_T,
        end_s_T=end_T,
        busy_s_D=busy_D,
        peak_bytes_D=peak_D,
        over_bytes_D=np.maximum(peak_D - problem.memory_bytes_D, 0.0),
        transfers=tuple(transfers),
        bytes_DD=bytes_DD,
    )


def readers(problem: Problem, tensor: int) -> Ints:
    """The tasks that read a tensor."""
    return problem.uses_C[problem.first_use_K1[tensor] : problem.first_use_K1[tensor + 1]]


def check_plan(problem: Problem, plan: Plan) -> None:
    """Raises: PlacementError when a plan is not one for this problem."""
    placed = np.asarray(plan.device_G)
    if placed.shape != (problem.groups,) or (placed < 0).any() or (placed >= problem.devices).any():
        raise PlacementError(
            f"the plan of {plan.algorithm or 'an algorithm'} places {placed.shape} groups on devices up to "
            f"{placed.max(initial=-1)}; the problem has {problem.groups} groups and {problem.devices} devices."
        )
    if not np.array_equal(np.sort(plan.order_T), np.arange(problem.tasks)):
        raise PlacementError(f"the order of {plan.algorithm or 'a plan'} must hold each of {problem.tasks} tasks once.")
    position_T = np.empty(problem.tasks, dtype=np.int64)
    position_T[plan.order_T] = np.arange(problem.tasks)
    made_C = position_T[np.repeat(problem.producer_K, np.diff(problem.first_use_K1))]
    early = np.flatnonzero(made_C >= position_T[problem.uses_C])
    if len(early):
        reader = problem.task_names_T[problem.uses_C[early[0]]]
        raise PlacementError(
            f"the order of {plan.algorithm or 'a plan'} runs {reader} before a task whose tensor it reads. "
            "Orders come from place/order.py."
        )


def _peak_bytes(problem: Problem, plan: Plan, end_T: Floats, transfers: list[Transfer]) -> Floats:
    """The most memory that each device holds at a time.

    Memory is freed only where a task of the device ends. So from the end of one task to the end of the next it only
    grows, and it is highest just before these ends: what counts of a time is between which two ends it lies.
    """
    device_T = plan.device_G[problem.group_T]
    peak_D = np.bincount(plan.device_G, problem.resident_bytes_G, problem.devices).astype(np.float64)
    place_T = np.zeros(problem.tasks, dtype=np.int64)  # where a task stands among those of its device
    change_D, ends_D = [], []
    for device in range(problem.devices):
        own = plan.order_T[device_T[plan.order_T] == device]
        place_T[own] = np.arange(len(own))
        ends_D.append(end_T[own])
        change_D.append(np.zeros(len(own) + 1))

    def hold(tensor: int, device: int, begin: int) -> None:
        last = max((place_T[r] for r in readers(problem, tensor) if device_T[r] == device), default=begin)
        change_D[device][min(begin, last)] += problem.bytes_K[tensor]
        change_D[device][last + 1] -= problem.bytes_K[tensor]

    for tensor, producer in enumerate(problem.producer_K):
        hold(tensor, device_T[producer], place_T[producer])
    for transfer in transfers:
        begin = int(np.searchsorted(ends_D[transfer.target], transfer.end_s, side="right"))
        hold(transfer.tensor, transfer.target, begin)
    for device in range(problem.devices):
        own = plan.order_T[device_T[plan.order_T] == device]
        held = np.cumsum(change_D[device])[:-1] + problem.scratch_bytes_T[own]
        peak_D[device] += held.max(initial=0.0)
    return peak_D
