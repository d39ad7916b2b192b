"""Adagrad: each coordinate's rate falls with the gradients it has seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from millrace.optim.base import Rule, State, Update, coupled_decay
from millrace.optim.checks import check_number


@final
@dataclass(frozen=True)
class Adagrad(Rule):
    """Divides each coordinate of the gradient by the root of the sum of its squares so far (torch's form).

        s <- s + g^2
        p <- p - lr / (1 + step * lr_decay) * g / (sqrt(s) + eps)

    Weight decay is coupled. Source: Duchi, Hazan, Singer, "Adaptive subgradient methods for online learning and
    stochastic optimization", JMLR 2011, figure 1 with diagonal matrices.
    """

    lr_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10

    def __post_init__(self) -> None:
        check_number("Adagrad", "lr_decay", self.lr_decay)
        check_number("Adagrad", "initial_accumulator_value", self.initial_accumulator_value)
        check_number("Adagrad", "eps", self.eps)

    @property
    def slots(self) -> tuple[str, ...]:
        return ("sum",)

    def init(self, parameter: Tensor) -> State:
        return {"sum": torch.full_like(parameter, self.initial_accumulator_value)}

    def at(self, *, learning_rate: Tensor, step: Tensor, weight_decay: float, dtype: torch.dtype) -> Update:
        descent = -learning_rate.to(dtype)
        if self.lr_decay:
            descent = descent / (1.0 + step.to(dtype) * self.lr_decay)

        def update(parameter: Tensor, gradient: Tensor, state: State) -> tuple[Tensor, State]:
            gradient = coupled_decay(gradient, parameter, weight_decay)
            total = state["sum"].addcmul(gradient, gradient)
            return parameter.addcdiv(gradient * descent, total.sqrt().add(self.eps)), {"sum": total}

        return update
