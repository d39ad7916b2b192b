"""Lion: the sign of an interpolated momentum; found by a search over update programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from millrace.optim.base import Rule, State, Update, decoupled_decay
from millrace.optim.checks import check_betas


@final
@dataclass(frozen=True)
class Lion(Rule):
    """Moves every coordinate by the same amount, in the direction of the sign of a momentum.

        p <- p - lr * (sign(beta1 * m + (1 - beta1) * g) + w * p)
        m <- beta2 * m + (1 - beta2) * g

    Weight decay w is decoupled; the paper advises a learning rate 3-10 times smaller and a decay 3-10 times larger
    than AdamW's. Source: Chen et al., "Symbolic discovery of optimization algorithms", NeurIPS 2023, algorithm 2.
    """

    betas: tuple[float, float] = (0.9, 0.99)

    def __post_init__(self) -> None:
        check_betas("Lion", self.betas)

    @property
    def slots(self) -> tuple[str, ...]:
        return ("exp_avg",)

    def at(self, *, learning_rate: Tensor, step: Tensor, weight_decay: float, dtype: torch.dtype) -> Update:
        beta1, beta2 = self.betas
        descent = -learning_rate.to(dtype)
        shrink = decoupled_decay(learning_rate, weight_decay, dtype) if weight_decay else None

        def update(parameter: Tensor, gradient: Tensor, state: State) -> tuple[Tensor, State]:
            direction = state["exp_avg"].lerp(gradient, 1.0 - beta1).sign()
            shrunk = parameter if shrink is None else parameter.mul(shrink)
            return shrunk.addcmul(direction, descent), {"exp_avg": state["exp_avg"].lerp(gradient, 1.0 - beta2)}

        return update
