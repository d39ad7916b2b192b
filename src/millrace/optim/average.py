"""A running average of the parameters, kept beside them and used instead of them wherever a model is only looked at.

Late in training the parameters wander about a point that is better than any of theirs; their average lies nearer to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

AVERAGE_SLOT = "average"
# A block of a split variable says so behind its name: "optimizer/fc.weight/average[0:500]" is of "fc.weight[0:500]".
_NAME = re.compile(rf"optimizer/(.+)/{AVERAGE_SLOT}(\[[^\]]*\])?")


def moved(average: Tensor, parameter: Tensor, decay: float, step: Tensor) -> Tensor:
    """The average after an update: average <- d * average + (1 - d) * parameter.

    d = min(decay, (1 + t) / (10 + t)), where t updates came before: with `decay` from the beginning on, random initial
    weights would count for as long as good ones do.

    Args:
        average, parameter: of one shape; the parameter after the update.
        decay: from 0 to 1.
        step: t, 0-dim int64 tensor.

    Source: TensorFlow's ExponentialMovingAverage, with `num_updates`, as Szegedy et al. 2016 ("Rethinking the
    Inception architecture for computer vision", section 8) trained with.
    """
    t = step.to(device=average.device, dtype=average.dtype)
    share = torch.clamp(9.0 / (10.0 + t), min=1.0 - decay)  # 1 - d
    return torch.lerp(average, parameter.to(average.dtype), share)


def averages_in(variables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The averages among the variables of a run, by the parameter's name; empty where its optimizer keeps none."""
    found = ((_NAME.fullmatch(name), value) for name, value in variables.items())
    return {match[1] + (match[2] or ""): value for match, value in found if match is not None}
