"""Optimizers by name: `adamw(1e-3, clip_norm=1.0)` is what most programs write.

The settings that are no rule's own mean the same everywhere:

- `learning_rate`: a number, or a schedule such as `warmup(100, then=cosine(1e-3, steps=1000))`.
- `weight_decay`: coupled (added to the gradient), except for `adamw` and `lion`, where it is decoupled.
- `clip_norm`: bound on the global norm of all gradients; None for no bound.
- `accumulate`: apply every k-th call, on the mean of k gradients.
- `groups`: exceptions by parameter name, such as `(Group("*.bias", weight_decay=0.0),)`; the first match counts.

Defaults are torch's where torch has the rule.
"""

from __future__ import annotations

from collections.abc import Sequence

from millrace.optim.optimizer import Group, Optimizer
from millrace.optim.rules.adagrad import Adagrad
from millrace.optim.rules.adam import Adam
from millrace.optim.rules.lion import Lion
from millrace.optim.rules.rmsprop import RMSProp
from millrace.optim.rules.sgd import SGD
from millrace.optim.schedule import Schedule


def sgd(
    learning_rate: float | Schedule = 1e-3,
    *,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    accumulate: int = 1,
    groups: Sequence[Group] = (),
) -> Optimizer:
    """Stochastic gradient descent: p <- p - lr * g."""
    return Optimizer(SGD(), learning_rate, weight_decay, clip_norm, accumulate, tuple(groups))


def momentum(
    learning_rate: float | Schedule = 1e-3,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    accumulate: int = 1,
    groups: Sequence[Group] = (),
) -> Optimizer:
    """SGD along a decaying sum of past gradients (Polyak, 1964)."""
    return Optimizer(SGD(momentum), learning_rate, weight_decay, clip_norm, accumulate, tuple(groups))


def nesterov(
    learning_rate: float | Schedule = 1e-3,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    accumulate: int = 1,
    groups: Sequence[Group] = (),
) -> Optimizer:
    """SGD with Nesterov's momentum, which looks one step ahead (Sutskever et al., 2013)."""
    rule = SGD(momentum, nesterov=True)
    return Optimizer(rule, learning_rate, weight_decay, clip_norm, accumulate, tuple(groups))


def adagrad(
    learning_rate: float | Schedule = 1e-2,
    *,
    lr_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    accumulate: int = 1,
    groups: Sequence[Group] = (),
) -> Optimizer:
    """Adagrad: each coordinate's rate falls with the gradients it has seen (Duchi et al., 2011)."""
    rule = Adagrad(lr_decay, initial_accumulator_value, eps)
    return Optimizer(rule, learning_rate, weight_decay, clip_norm, accumulate, tuple(groups))


def rmsprop(
    learning_rate: float | Schedule = 1e-2,
    *,
    alpha: float = 0.99,
    eps: float = 1e-8,
    momentum: float = 0.0,
    centered: bool = False,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    accumulate: int = 1,
    groups: Sequence[Group] = (),
) -> Optimizer:
    """RMSProp: the gradient over a running root mean square of itself (Tieleman and Hinton, 2012)."""
    rule = RMSProp(alpha, eps, momentum, centered)
    return Optimizer(rule, learning_rate, weight_decay, clip_norm, accumulate, tuple(groups))


def adam(
    learning_rate: float | Schedule = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    accumulate: int = 1,
    groups: Sequence[Group] = (),
) -> Optimizer:
    """Adam: bias-corrected first over root of second moment (Kingma and Ba, 2015); weight decay is coupled."""
    return Optimizer(Adam(betas, eps), learning_rate, weight_decay, clip_norm, accumulate, tuple(groups))


def adamw(
    learning_rate: float | Schedule = 1e-3,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    clip_norm: float | None = None,
    accumulate: int = 1,
    groups: Sequence[Group] = (),
) -> Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019)."""
    rule = Adam(betas, eps, decoupled=True)
    return Optimizer(rule, learning_rate, weight_decay, clip_norm, accumulate, tuple(groups))


def lion(
    learning_rate: float | Schedule = 1e-4,
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    accumulate: int = 1,
    groups: Sequence[Group] = (),
) -> Optimizer:
    """Lion: moves by the sign of a momentum (Chen et al., 2023); weight decay is decoupled."""
    return Optimizer(Lion(betas), learning_rate, weight_decay, clip_norm, accumulate, tuple(groups))
