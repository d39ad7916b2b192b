"""Whether a placement fits into memory: an estimate for those who build one, and the refusal when none fits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from millrace.errors import PlacementError
from millrace.place.devices import ALIKE, total_seconds
from millrace.place.problem import Floats, Problem
from millrace.place.tables import tables


def estimated_bytes(problem: Problem, members_GD: NDArray[np.bool_], open_microbatches: int = 0) -> Floats:
    """About what devices hold with these groups on them: variables, what waits for the backward pass, one task: [D].

    open_microbatches: how many each device has begun and not ended at a time; 0 for all of them.
    """
    made = tables(problem)
    opened = min(open_microbatches or made.microbatches, made.microbatches)
    fixed_D = (problem.resident_bytes_G + opened * made.held_bytes_G) @ members_GD
    working_D = np.where(members_GD, made.working_bytes_G[:, None], 0.0).max(axis=0, initial=0.0)
    return np.asarray(fixed_D + working_D)


def lacks_fast_memory(problem: Problem) -> bool:
    """Whether the fastest devices cannot hold the variables and one microbatch, and there are others."""
    slowness_D = total_seconds(problem)
    fast_D = slowness_D <= ALIKE * slowness_D.min(initial=np.inf)
    needs_bytes = float((problem.resident_bytes_G + tables(problem).held_bytes_G).sum())
    return bool(not fast_D.all() and needs_bytes > problem.memory_bytes_D[fast_D].sum())


def does_not_fit(problem: Problem, peak_bytes_D: Floats, algorithm: str) -> PlacementError:
    """The error that says by how much a placement does not fit, and what would."""
    over_D = peak_bytes_D - problem.memory_bytes_D
    lacking = ", ".join(
        f"{name} needs {_size(peak)} and may use {_size(memory)}"
        for name, peak, memory, over in zip(
            problem.device_names_D, peak_bytes_D, problem.memory_bytes_D, over_D, strict=True
        )
        if over > 0
    )
    resident, memory = problem.resident_bytes_G.sum(), problem.memory_bytes_D.sum()
    largest = int(np.argmax(problem.memory_bytes_D))
    heaviest = int(np.argmax(problem.resident_bytes_G)) if problem.groups else 0
    group = problem.group_names_G[heaviest] if problem.groups else ""
    if resident > memory:
        advice = f"Variables alone exceed all memory by {_size(resident - memory)}: add devices that hold as much."
    elif problem.groups and problem.resident_bytes_G[heaviest] > problem.memory_bytes_D.max():
        advice = (
            f"The group {group!r} alone has {_size(problem.resident_bytes_G[heaviest])} of variables: no device is "
            "large enough. Split it (`partitions`), or add a device that holds it."
        )
    else:
        advice = "Use more microbatches or a smaller batch, or add a device (a CPU with its memory counts as one)."
        if algorithm != "auto":
            advice += " The algorithm 'auto' searches for plans that fit."
    return PlacementError(
        f"{algorithm} found no plan that fits into memory: {lacking}. Lacking in all: "
        f"{_size(float(np.maximum(over_D, 0.0).sum()))}. The variables need {_size(float(resident))}, most of it "
        f"in the group {group!r}; the devices have {_size(float(memory))}, the largest is "
        f"{problem.device_names_D[largest]} with {_size(float(problem.memory_bytes_D[largest]))}. {advice}"
    )


def _size(size_bytes: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.3g} {unit}"
    return f"{size_bytes:.0f} bytes"
