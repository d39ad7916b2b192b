"""Clipping of gradients by their global norm."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from millrace.errors import SettingError
from millrace.optim.base import arithmetic_dtype
from millrace.optim.checks import check_number

# torch's guard against division by zero; part of the result, so the same here.
_NORM_EPS = 1e-6


def global_norm(gradients: Mapping[str, Tensor]) -> Tensor:
    """The Euclidean norm of all gradients taken as one vector.

    Args:
        gradients: at least one dense tensor, by parameter name; devices may differ.

    Returns:
        0-dim tensor on the first gradient's device, float64 if any gradient is, else float32.

    """
    if not gradients:
        raise SettingError("global_norm: gradients must hold at least one tensor, got none.")
    device = next(iter(gradients.values())).device
    widths = {arithmetic_dtype(gradient.dtype) for gradient in gradients.values()}
    dtype = torch.float64 if torch.float64 in widths else torch.float32
    norms = [
        torch.linalg.vector_norm(gradient, dtype=arithmetic_dtype(gradient.dtype)).to(device=device, dtype=dtype)
        for gradient in gradients.values()
    ]
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_by_global_norm(gradients: Mapping[str, Tensor], max_norm: float) -> tuple[dict[str, Tensor], Tensor]:
    """Scale all gradients by one factor so that their global norm is at most `max_norm`.

    The direction of the step stays; only its length is bounded. Same result as `torch.nn.utils.clip_grad_norm_`, but
    nothing is written in place. A norm that is NaN or infinite passes on into the gradients, where it is seen.

    Args:
        gradients: dense tensors by parameter name; none at all is fine.
        max_norm: more than 0.

    Returns:
        The scaled gradients, in their own dtypes, and the norm before scaling (0-dim).

    Source: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", ICML 2013,
    algorithm 1.

    """
    check_number("clip_by_global_norm", "max_norm", max_norm, low_open=True)
    if not gradients:
        return {}, torch.zeros(())
    norm = global_norm(gradients)
    factor = (max_norm / (norm + _NORM_EPS)).clamp(max=1.0)
    clipped = {name: (gradient * factor.to(gradient.device)).to(gradient.dtype) for name, gradient in gradients.items()}
    return clipped, norm
