"""The picture that drives a unit most, found by climbing.

Le et al., "Building high-level features using large scale unsupervised learning", ICML 2012, §4.4: maximize a unit's
value over pictures of one norm.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from millrace.data.crops import standardized


def optimal_stimulus(
    unit: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    steps: int = 300,
    rate: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Projected gradient ascent: a step along the gradient, then back to mean 0 and variance 1.

    Args:
        unit: [n, C, H, W] to the unit's values, [n].
        start: [n, C, H, W], where each of n climbs begins.
        steps: of each climb.
        rate: length of the first step, as a share of the picture's norm; it falls to nothing along a line.

    Returns: the picture of the best climb, [C, H, W], and the unit's values at the ends of all climbs, [n].
    """
    pictures = _projected(start.detach())
    for step in range(steps):
        pictures.requires_grad_(True)
        (gradient,) = torch.autograd.grad(unit(pictures).sum(), pictures)
        length = gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
        move = gradient / length.clamp_min(torch.finfo(gradient.dtype).tiny)
        pictures = _projected(pictures.detach() + rate * (1 - step / steps) * move)
    with torch.no_grad():
        values = unit(pictures)
    return pictures[int(values.argmax())], values


def smooth_stimulus(unit: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The picture that drives a unit most, found by climbing among blurred ones, which are smooth as photographs are.

    Args: unit, start: as for `optimal_stimulus`.

    Returns: [C, H, W], standardized, on the CPU.
    """

    def smooth(pictures: Tensor) -> Tensor:
        blurred = functional.avg_pool2d(pictures, 3, stride=1, padding=1, count_include_pad=False)
        return standardized(functional.avg_pool2d(blurred, 3, stride=1, padding=1, count_include_pad=False))

    best, _ = optimal_stimulus(lambda pictures: unit(smooth(pictures)), start)
    return smooth(best[None])[0].cpu()


def _projected(pictures: Tensor) -> Tensor:
    """To mean 0 and variance 1, each."""
    centred = pictures - pictures.mean((1, 2, 3), keepdim=True)
    return centred / centred.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-8)
