"""RMSProp: the gradient over a running root mean square of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from millrace.optim.base import Rule, State, Update, coupled_decay
from millrace.optim.checks import check_flag, check_number


@final
@dataclass(frozen=True)
class RMSProp(Rule):
    """Divides the gradient by a running root mean square, or, centered, by a running standard deviation.

        s <- alpha * s + (1 - alpha) * g^2
        m <- alpha * m + (1 - alpha) * g                            (centered; else m = 0)
        b <- momentum * b + g / (sqrt(s - m^2) + eps)
        p <- p - lr * b

    This is torch's form: eps stands outside the root and the learning rate outside the momentum. Weight decay is
    coupled. Sources: Tieleman and Hinton, "Neural networks for machine learning", lecture 6.5, 2012; centered:
    Graves, "Generating sequences with recurrent neural networks", 2013, equations 38-45.
    """

    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    centered: bool = False

    def __post_init__(self) -> None:
        check_number("RMSProp", "alpha", self.alpha, high=1.0)
        check_number("RMSProp", "eps", self.eps)
        check_number("RMSProp", "momentum", self.momentum, high=1.0)
        check_flag("RMSProp", "centered", self.centered)

    @property
    def slots(self) -> tuple[str, ...]:
        centered = ("grad_avg",) if self.centered else ()
        momentum = ("momentum_buffer",) if self.momentum else ()
        return ("square_avg", *centered, *momentum)

    def at(self, *, learning_rate: Tensor, step: Tensor, weight_decay: float, dtype: torch.dtype) -> Update:
        descent = -learning_rate.to(dtype)

        def update(parameter: Tensor, gradient: Tensor, state: State) -> tuple[Tensor, State]:
            gradient = coupled_decay(gradient, parameter, weight_decay)
            square = state["square_avg"].mul(self.alpha).addcmul(gradient, gradient, value=1.0 - self.alpha)
            new_state = {"square_avg": square}
            variance = square
            if self.centered:
                mean = state["grad_avg"].lerp(gradient, 1.0 - self.alpha)
                new_state["grad_avg"] = mean
                variance = square.addcmul(mean, mean, value=-1.0)
            scale = variance.sqrt().add(self.eps)
            if not self.momentum:
                return parameter.addcdiv(gradient * descent, scale), new_state
            velocity = state["momentum_buffer"].mul(self.momentum).addcdiv(gradient, scale)
            return parameter.addcmul(velocity, descent), {**new_state, "momentum_buffer": velocity}

        return update
