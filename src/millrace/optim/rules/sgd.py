"""Stochastic gradient descent, with classical or Nesterov momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from millrace.errors import SettingError
from millrace.optim.base import Rule, State, Update, coupled_decay
from millrace.optim.checks import check_flag, check_number


@final
@dataclass(frozen=True)
class SGD(Rule):
    """Steps against the gradient, or against a decaying sum of past gradients (torch's form, without dampening).

        v <- momentum * v + g
        p <- p - lr * v                     classical
        p <- p - lr * (g + momentum * v)    Nesterov

    Weight decay is coupled. Sources: Polyak, "Some methods of speeding up the convergence of iteration methods",
    1964; Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013
    (equations 1-4; here the learning rate stands outside the velocity, as in torch).
    """

    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        check_number("SGD", "momentum", self.momentum, high=1.0)
        check_flag("SGD", "nesterov", self.nesterov)
        if self.nesterov and self.momentum == 0.0:
            raise SettingError("SGD: nesterov=True needs momentum in (0, 1), got 0; set momentum, e.g. to 0.9.")

    @property
    def slots(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.momentum else ()

    def at(self, *, learning_rate: Tensor, step: Tensor, weight_decay: float, dtype: torch.dtype) -> Update:
        descent = -learning_rate.to(dtype)

        def update(parameter: Tensor, gradient: Tensor, state: State) -> tuple[Tensor, State]:
            gradient = coupled_decay(gradient, parameter, weight_decay)
            if not self.momentum:
                return parameter.addcmul(gradient, descent), {}
            velocity = state["momentum_buffer"].mul(self.momentum).add(gradient)
            direction = gradient.add(velocity, alpha=self.momentum) if self.nesterov else velocity
            return parameter.addcmul(direction, descent), {"momentum_buffer": velocity}

        return update
