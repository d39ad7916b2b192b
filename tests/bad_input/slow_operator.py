"""An operator that takes as long as the batch says, so that a worker can be met in the middle of a step."""

from __future__ import annotations

import time

import torch
from torch import Tensor


@torch.library.custom_op("millrace_test::nap", mutates_args=())
def nap(x: Tensor, seconds: Tensor) -> Tensor:
    """The same values, later."""
    time.sleep(float(seconds))
    return x.clone()


@nap.register_fake
def _(x: Tensor, seconds: Tensor) -> Tensor:
    return torch.empty_like(x)


nap.register_autograd(lambda ctx, gradient: (gradient, None))
