"""Operators whose backward pass takes its time, so that a test can do something meanwhile."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

MARK = 100.0


@torch.library.custom_op("slow_backward::sleep", mutates_args=())
def sleep(gradient: Tensor, mark: Tensor, seconds: float) -> Tensor:
    """The gradient, after so many seconds if there is a mark."""
    if bool((mark >= MARK).any()):
        time.sleep(seconds)
    return gradient.clone()


@torch.library.custom_op("slow_backward::slowly", mutates_args=())
def slowly(values: Tensor, mark: Tensor, seconds: float) -> Tensor:
    """The values; their gradient comes late if there is a mark."""
    return values.clone()


@sleep.register_fake
def _(gradient: Tensor, mark: Tensor, seconds: float) -> Tensor:
    return torch.empty_like(gradient)


@slowly.register_fake
def _(values: Tensor, mark: Tensor, seconds: float) -> Tensor:
    return torch.empty_like(values)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.seconds = inputs[2]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return sleep(gradient, ctx.saved_tensors[0], ctx.seconds), None, None


slowly.register_autograd(_backward, setup_context=_keep)
