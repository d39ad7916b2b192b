"""Whether a compiled step did the same as the eager one, up to rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from millrace.graph.graph import Graph

# Largest accepted relative difference of (fetches, the whole of all updates), by the coarsest dtype in the step.
# Updates get more room: Adam divides by the root of tiny gradients, so that rounding in a gradient of nearly zero moves
# its parameter by as much as a real gradient would.
_TOLERANCE = {torch.float64: (1e-6, 1e-2), torch.float32: (1e-3, 0.1), torch.bfloat16: (0.05, 0.3)}


def difference(
    before: Sequence[Tensor],
    eager: Sequence[Tensor],
    compiled: Sequence[Tensor],
    eager_fetches: Sequence[Tensor],
    compiled_fetches: Sequence[Tensor],
    tolerance: tuple[float, float],
) -> str:
    """What differs by more than rounding explains, in words; "" when nothing does.

    `before`: the variables before the step; `eager`, `compiled`: after it, by either way. `tolerance`: of the graph.
    """
    fetch_tolerance, update_tolerance = tolerance
    for position, (a, b) in enumerate(zip(eager_fetches, compiled_fetches, strict=True)):
        relative = _distance([a], [b]) / max(_size([a]), 1e-6)
        if not relative <= fetch_tolerance and not _both_bad(a, b):
            return f"fetch {position} by {relative:.1e} (relative)"
    floats = [i for i, v in enumerate(before) if v.is_floating_point()]
    moved = _distance([before[i] for i in floats], [eager[i] for i in floats])
    apart = _distance([compiled[i] for i in floats], [eager[i] for i in floats])
    if not apart <= update_tolerance * moved + 1e-6 * _size([before[i] for i in floats]):
        return f"the updates by {apart / max(moved, 1e-30):.1e} of their size"
    for i, (a, b) in enumerate(zip(eager, compiled, strict=True)):
        if not a.is_floating_point() and not torch.equal(a, b):
            return f"variable number {i} ({a.dtype})"
    return ""


def tolerance(graph: Graph) -> tuple[float, float]:
    """Largest relative difference of (fetches, the whole of all updates) that rounding explains in `graph`."""
    values = [node.meta.get("val") for node in graph.nodes]
    dtypes = {v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.ndim}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if dtype in dtypes:
            return _TOLERANCE.get(dtype, _TOLERANCE[torch.bfloat16])
    return _TOLERANCE[torch.float64]


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True)) ** 0.5


def _size(a: Sequence[Tensor]) -> float:
    return sum(float(x.double().square().sum()) for x in a) ** 0.5


def _both_bad(a: Tensor, b: Tensor) -> bool:
    return bool(~torch.isfinite(a.double()).all() & ~torch.isfinite(b.double()).all())
