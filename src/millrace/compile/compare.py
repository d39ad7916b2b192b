"""Whether a compiled step did the same as the eager one, up to rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from millrace.graph.graph import Graph

# Largest accepted relative difference of (fetches, the whole of all updates), by the coarsest dtype in the step.
# Updates get more room: Adam divides by the root of tiny gradients, so that rounding in a gradient of nearly zero moves
# its parameter by as much as a real gradient would.
_TOLERANCE = {torch.float64: (1e-6, 1e-2), torch.float32: (1e-3, 0.1), torch.bfloat16: (0.05, 0.3)}


@dataclass(frozen=True)
class Movement:
    """What a step did to one variable."""

    size: float  # of the variable before, as a vector of its finite elements
    distance: float  # from there to its new value; 0 for integers


def movements(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[Movement]:
    """Of every variable that a step updates, how far it went."""
    return [
        Movement(_size(old), _distance(old, new)) if _inexact(old) else Movement(0.0, 0.0)
        for old, new in zip(before, after, strict=True)
    ]


def difference(
    moved: Sequence[Movement],
    compiled: Sequence[Tensor],
    eager: Sequence[Tensor],
    compiled_fetches: Sequence[Tensor],
    eager_fetches: Sequence[Tensor],
    tolerance: tuple[float, float],
    counted: Sequence[bool],
) -> str:
    """What differs by more than rounding explains, in words; "" when nothing does.

    `compiled`, `eager`: the updated variables after the step, by either way; `moved`: what the compiled one did to
    them. `tolerance`, `counted`: of the graph.
    """
    fetch_tolerance, update_tolerance = tolerance
    for position, (a, b, counts) in enumerate(zip(eager_fetches, compiled_fetches, counted, strict=True)):
        if wrong := _fetch_difference(a, b, fetch_tolerance, counts):
            return f"fetch {position} {wrong}"
    apart_2 = moved_2 = size_2 = 0.0
    for position, (movement, a, b) in enumerate(zip(moved, eager, compiled, strict=True)):
        if not _inexact(a):
            if not torch.equal(a, b):
                return f"updated variable number {position} ({a.dtype})"
            continue
        apart = _distance(a, b)
        # One update that is missing altogether would drown in the others.
        if movement.distance == 0 and apart > 1e-5 * movement.size:
            return f"updated variable number {position}, which it left as it was"
        apart_2, moved_2, size_2 = apart_2 + apart**2, moved_2 + movement.distance**2, size_2 + movement.size**2
    accepted = update_tolerance * moved_2**0.5 + 1e-6 * size_2**0.5
    if not math.isfinite(apart_2) or apart_2**0.5 > accepted:
        return f"the updates by {(apart_2 / max(moved_2, 1e-60)) ** 0.5:.1e} of their size"
    return ""


def tolerance(graph: Graph) -> tuple[float, float]:
    """Largest relative difference of (fetches, the whole of all updates) that rounding explains in `graph`."""
    values = [node.meta.get("val") for node in graph.nodes]
    dtypes = {v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.ndim}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if dtype in dtypes:
            return _TOLERANCE.get(dtype, _TOLERANCE[torch.bfloat16])
    return _TOLERANCE[torch.float64]


def counted_fetches(graph: Graph) -> list[bool]:
    """Which fetches only count or choose (accuracy, argmax): where two scores tie, rounding alone decides them.

    These are made of integers or truth values that were made of real numbers.
    """
    real: dict[Node, bool] = {}  # whether a real number has a part in it
    smooth: dict[Node, bool] = {}  # whether one has, by way of real numbers alone
    for node in graph.fx.nodes:
        value = node.meta.get("val")
        parts = value if isinstance(value, tuple | list) else [value]
        is_real = any(isinstance(part, Tensor) and _inexact(part) for part in parts)
        inputs = node.all_input_nodes
        real[node] = (is_real and not inputs) or any(real[n] for n in inputs)
        smooth[node] = is_real and (not inputs or any(smooth[n] for n in inputs))
    nodes = {node.name: node for node in graph.fx.nodes}
    return [real[nodes[name]] and not smooth[nodes[name]] for name in graph.fetches.values()]


def _fetch_difference(a: Tensor, b: Tensor, tolerance: float, counts: bool) -> str:
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return f"is {b.dtype} {list(b.shape)} instead of {a.dtype} {list(a.shape)}"
    if counts:
        return ""
    if not _inexact(a):
        return "" if torch.equal(a, b) else f"({a.dtype})"
    relative = _distance(a, b) / max(_size(a), 1e-6)
    if relative <= tolerance or (not torch.isfinite(a).all() and not torch.isfinite(b).all()):
        return ""
    return f"by {relative:.1e} (relative)"


def _inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _distance(a: Tensor, b: Tensor) -> float:
    """Euclidean; equal elements are at distance 0, infinite ones (a mask's) too."""
    if a.dtype.itemsize == 1:  # float8 has no arithmetic
        a, b = a.float(), b.float()
    return _norm(torch.where(a == b, torch.zeros_like(a), a - b))


def _size(a: Tensor) -> float:
    a = a.float() if a.dtype.itemsize == 1 else a
    return _norm(torch.where(torch.isfinite(a), a, torch.zeros_like(a)))


def _norm(a: Tensor) -> float:
    wide = torch.complex128 if a.is_complex() else torch.float64
    return float(torch.linalg.vector_norm(a, dtype=wide)) if a.numel() else 0.0
