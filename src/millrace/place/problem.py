"""What a placement algorithm sees: tasks, tensors and devices as arrays.

A *group* is a set of nodes that are placed together (a layer's forward, backward and update nodes and its variables). A
*task* is a part of a group that runs in one go: its forward nodes for one microbatch, say. Tasks are numbered so that
each comes after those whose tensors it reads.

Letters in shapes: G groups, T tasks, K tensors, C uses of tensors by tasks, D devices.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Problem:
    """What to place, and where it may go.

    A tensor goes to another device once, however many tasks there read it. It takes memory on the device that made it
    from the start of its task, and on each other device from the end of its transfer, until the last task there that
    reads it has ended.
    """

    group_names_G: tuple[str, ...]
    flops_G: Floats  # of a whole step
    resident_bytes_G: Floats  # variables of the group: held for the whole run
    pipeline_G: Ints  # where the group stands in the forward pass: 0, 1, 2, …

    task_names_T: tuple[str, ...]
    group_T: Ints  # the group of each task
    microbatch_T: Ints
    backward_T: NDArray[np.bool_]  # a backward task
    scratch_bytes_T: Floats  # memory that the task needs while it runs, beside its tensors
    seconds_TD: Floats  # on each device; infinite where it may not run

    producer_K: Ints  # the task that makes each tensor
    bytes_K: Floats  # in memory
    wire_bytes_K: Floats  # on the way to another device
    first_use_K1: Ints  # [K + 1] tensor k is read by the tasks uses_C[first_use[k]:first_use[k + 1]]
    uses_C: Ints

    device_names_D: tuple[str, ...]
    memory_bytes_D: Floats
    latency_s_DD: Floats  # 0 on the diagonal
    bytes_per_s_DD: Floats  # infinite on the diagonal
    # The number of the wire; transfers on one wire wait for each other. -1: none, as the sender itself does the work
    # and runs no task meanwhile (and on the diagonal).
    wire_DD: Ints
    alone_s_TD: Floats | None = None  # while the other devices of the host rest; None: they do not slow each other down
    host_D: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # devices of one number share a host

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return len(self.group_names_G)

    @property
    def tasks(self) -> int:
        """How many tasks there are."""
        return len(self.task_names_T)

    @property
    def devices(self) -> int:
        """How many devices there are."""
        return len(self.device_names_D)


@dataclass(frozen=True, eq=False)
class Plan:
    """An answer: the device of every group, and the order in which tasks run (each device runs its own in this order).

    order_T: every task once, each after those whose tensors it reads. algorithm: who found it. note: how, in a few
    words that a person can read.
    """

    device_G: Ints
    order_T: Ints
    algorithm: str = ""
    note: str = ""
