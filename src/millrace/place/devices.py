"""Which devices are alike, and which are fast."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from millrace.errors import PlacementError
from millrace.place.problem import Floats, Ints, Problem
from millrace.place.tables import tables

ALIKE = 1.05  # devices of one kind, when measured, differ by less


def device_classes(problem: Problem) -> Ints:
    """A number for each device, the same for devices that a plan may exchange without any difference: [D]."""
    class_D = np.arange(problem.devices)
    for device in range(problem.devices):
        for earlier in range(device):
            if class_D[earlier] == earlier and _interchangeable(problem, earlier, device):
                class_D[device] = earlier
                break
    return class_D


def device_sequences(problem: Problem, most: int) -> Iterator[tuple[int, ...]]:
    """Orders of some of the devices, no two of which are alike, until there have been `most`.

    Faster devices come first, and all of them together before fewer.
    """
    class_D = device_classes(problem)
    members = {c: np.flatnonzero(class_D == c).tolist() for c in np.unique(class_D).tolist()}
    speed_D = total_seconds(problem)
    fastest = sorted(range(problem.devices), key=lambda d: (speed_D[d], d))
    seen: set[tuple[int, ...]] = set()
    for length in range(problem.devices, 0, -1):
        for sequence in itertools.islice(itertools.permutations(fastest, length), 20 * most):
            kind = tuple(class_D[list(sequence)].tolist())
            if kind not in seen:
                seen.add(kind)
                left = {c: iter(devices) for c, devices in members.items()}
                yield tuple(next(left[c]) for c in kind)
                if len(seen) >= most:
                    return


def total_seconds(problem: Problem) -> Floats:
    """What all groups that may run anywhere take on each device: [D]."""
    made = tables(problem)
    anywhere_G = made.allowed_GD.all(axis=1)
    return np.asarray(made.seconds_GD[anywhere_G].sum(axis=0))


def pinned_devices(problem: Problem) -> Ints:
    """The device of each group that may run on one only, -1 for others: [G].

    Raises: PlacementError for a group that may run nowhere.
    """
    allowed_GD = tables(problem).allowed_GD
    count_G = allowed_GD.sum(axis=1)
    if (count_G == 0).any():
        name = problem.group_names_G[int(np.flatnonzero(count_G == 0)[0])]
        raise PlacementError(
            f"the group {name} may run on none of {', '.join(problem.device_names_D)}: the hints for its parts "
            "contradict each other, or no device has the operators. Loosen a hint, or add a device."
        )
    return np.where(count_G == 1, allowed_GD.argmax(axis=1), -1)


def pipeline_order(problem: Problem) -> Ints:
    """The groups in the order of the forward pass: [G]."""
    return np.argsort(problem.pipeline_G, kind="stable")


def _interchangeable(problem: Problem, one: int, other: int) -> bool:
    swap = np.arange(problem.devices)
    swap[[one, other]] = [other, one]
    grid = np.ix_(swap, swap)
    shares_DD = np.array([[(problem.wire_DD == w).sum() for w in row] for row in problem.wire_DD])
    return bool(
        problem.memory_bytes_D[one] == problem.memory_bytes_D[other]
        and np.array_equal(problem.seconds_TD[:, one], problem.seconds_TD[:, other])
        and all(np.array_equal(m, m[grid]) for m in (problem.latency_s_DD, problem.bytes_per_s_DD, shares_DD))
    )
