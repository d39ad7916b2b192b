"""Adam and AdamW: running mean of the gradient over running root mean square of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from millrace.optim.base import Rule, State, Update, coupled_decay, decoupled_decay
from millrace.optim.checks import check_betas, check_flag, check_number


@final
@dataclass(frozen=True)
class Adam(Rule):
    """Steps by bias-corrected first over root of second moment; AdamW is the form with `decoupled` weight decay.

        m <- beta1 * m + (1 - beta1) * g
        v <- beta2 * v + (1 - beta2) * g^2
        p <- p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps),    t = step + 1

    Weight decay w is coupled (g <- g + w * p, first of all) or decoupled (p <- (1 - lr * w) * p, before the step).
    Sources: Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015, algorithm 1; Loshchilov and
    Hutter, "Decoupled weight decay regularization", ICLR 2019, algorithm 2, with the learning rate multiplying the
    decay as in torch.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decoupled: bool = False

    def __post_init__(self) -> None:
        check_betas("Adam", self.betas)
        check_number("Adam", "eps", self.eps)
        check_flag("Adam", "decoupled", self.decoupled)

    @property
    def slots(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def at(self, *, learning_rate: Tensor, step: Tensor, weight_decay: float, dtype: torch.dtype) -> Update:
        beta1, beta2 = self.betas
        t = step.to(dtype) + 1.0
        root_correction = _one_minus_power(beta2, t).sqrt()
        # Numerator and denominator are both multiplied by the root of v's correction: one pass less over v.
        descent = -learning_rate.to(dtype) * root_correction / _one_minus_power(beta1, t)
        eps = root_correction * self.eps
        shrink = decoupled_decay(learning_rate, weight_decay, dtype) if self.decoupled and weight_decay else None

        def update(parameter: Tensor, gradient: Tensor, state: State) -> tuple[Tensor, State]:
            if not self.decoupled:
                gradient = coupled_decay(gradient, parameter, weight_decay)
            mean = state["exp_avg"].lerp(gradient, 1.0 - beta1)
            square = state["exp_avg_sq"].mul(beta2).addcmul(gradient, gradient, value=1.0 - beta2)
            shrunk = parameter if shrink is None else parameter.mul(shrink)
            new_parameter = shrunk.addcdiv(mean * descent, square.sqrt().add(eps))
            return new_parameter, {"exp_avg": mean, "exp_avg_sq": square}

        return update


def _one_minus_power(beta: float, t: Tensor) -> Tensor:
    """1 - beta^t to full precision; as a plain difference it loses four of float32's seven digits at t=1."""
    return torch.ones_like(t) if beta == 0.0 else -torch.expm1(t * math.log(beta))
