"""Learning-rate schedules: pure functions from the step to the rate, computed inside the graph.

Because the rate is a function of the step counter alone, a resumed run continues the same schedule with nothing to
save. Any function of a 0-dim tensor will do as a schedule; those here are frozen dataclasses, so that they print,
compare and pickle. `millrace.optim` exports them in lower case: `warmup(100, then=cosine(1e-3, steps=1000))`.

The step counts the updates applied before this one. It comes as a 0-dim tensor, floating in the dtype that the rate
is wanted in (an integer step is taken as float32).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from millrace.errors import SettingError
from millrace.optim.checks import check_count, check_number

Schedule = Callable[[Tensor], Tensor]
"""From the step (0-dim tensor) to the learning rate (0-dim tensor)."""


def _floating(step: Tensor) -> Tensor:
    return step if step.is_floating_point() else step.to(torch.float32)


def check_rate(owner: str, name: str, value: object) -> None:
    """Raise SettingError unless `value` is a number of at least 0 or something to call with the step."""
    if callable(value):
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < math.inf:
        raise SettingError(f"{owner}: {name} must be a number of at least 0 or a schedule, got {value!r}.")


@final
@dataclass(frozen=True)
class Constant:
    """The same rate at every step."""

    value: float

    def __post_init__(self) -> None:
        check_number("constant", "value", self.value)

    def __call__(self, step: Tensor) -> Tensor:
        return torch.full_like(_floating(step), self.value)


@final
@dataclass(frozen=True)
class Linear:
    """From `start` to `end` in a straight line over `steps`, then `end`."""

    start: float
    steps: int
    end: float = 0.0

    def __post_init__(self) -> None:
        check_number("linear", "start", self.start)
        check_count("linear", "steps", self.steps)
        check_number("linear", "end", self.end)

    def __call__(self, step: Tensor) -> Tensor:
        done = _floating(step).clamp(max=self.steps) / self.steps
        return self.start + (self.end - self.start) * done


@final
@dataclass(frozen=True)
class Cosine:
    """From `start` to `end` along half a cosine wave over `steps`, then `end`.

    Source: Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR 2017, equation 5,
    without restarts.
    """

    start: float
    steps: int
    end: float = 0.0

    def __post_init__(self) -> None:
        check_number("cosine", "start", self.start)
        check_count("cosine", "steps", self.steps)
        check_number("cosine", "end", self.end)

    def __call__(self, step: Tensor) -> Tensor:
        done = _floating(step).clamp(max=self.steps) / self.steps
        return self.end + (self.start - self.end) * 0.5 * (1.0 + torch.cos(math.pi * done))


@final
@dataclass(frozen=True)
class Exponential:
    """Falls smoothly by `factor` every `every` steps."""

    start: float
    factor: float
    every: int = 1

    def __post_init__(self) -> None:
        check_number("exponential", "start", self.start)
        check_number("exponential", "factor", self.factor, high=1.0, low_open=True, high_open=False)
        check_count("exponential", "every", self.every)

    def __call__(self, step: Tensor) -> Tensor:
        return self.start * torch.pow(self.factor, _floating(step) / self.every)


@final
@dataclass(frozen=True)
class StepDecay:
    """Falls by `factor` at once after each `every` steps."""

    start: float
    every: int
    factor: float = 0.1

    def __post_init__(self) -> None:
        check_number("step_decay", "start", self.start)
        check_count("step_decay", "every", self.every)
        check_number("step_decay", "factor", self.factor, high=1.0, low_open=True, high_open=False)

    def __call__(self, step: Tensor) -> Tensor:
        return self.start * torch.pow(self.factor, torch.floor(_floating(step) / self.every))


@final
@dataclass(frozen=True)
class Piecewise:
    """The rate `values[i]` from step `boundaries[i - 1]` on, up to and without step `boundaries[i]`."""

    boundaries: tuple[int, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("boundaries", "values"):
            if not isinstance(getattr(self, name), tuple):
                raise SettingError(f"piecewise: {name} must be a tuple, got {getattr(self, name)!r}.")
        if len(self.values) != len(self.boundaries) + 1:
            raise SettingError(
                f"piecewise: values must hold one more number than boundaries "
                f"({len(self.boundaries) + 1}), got {len(self.values)}."
            )
        for index, boundary in enumerate(self.boundaries):
            check_count("piecewise", f"boundaries[{index}]", boundary)
        if any(a >= b for a, b in zip(self.boundaries, self.boundaries[1:], strict=False)):
            raise SettingError(f"piecewise: boundaries must increase, got {self.boundaries!r}.")
        for index, value in enumerate(self.values):
            check_number("piecewise", f"values[{index}]", value)

    def __call__(self, step: Tensor) -> Tensor:
        rate = torch.full_like(_floating(step), self.values[0])
        for boundary, value in zip(self.boundaries, self.values[1:], strict=True):
            rate = torch.where(step >= boundary, value, rate)
        return rate


@final
@dataclass(frozen=True)
class InverseSquareRoot:
    """start * sqrt(steps / (steps + step)): halves by the time step reaches 3 * `steps`, and never ends.

    `warmup(n, then=inverse_square_root(peak, steps=n))` is the Transformer's schedule. Source: Vaswani et al.,
    "Attention is all you need", NeurIPS 2017, equation 3.
    """

    start: float
    steps: int

    def __post_init__(self) -> None:
        check_number("inverse_square_root", "start", self.start)
        check_count("inverse_square_root", "steps", self.steps)

    def __call__(self, step: Tensor) -> Tensor:
        return self.start * torch.rsqrt(_floating(step) / self.steps + 1.0)


@final
@dataclass(frozen=True)
class Warmup:
    """Rises in a straight line to `then`'s first rate over `steps`, after which `then` runs from its own step 0.

    `from_factor` is the fraction of that rate used at step 0; left out, it is 1 / (steps + 1), so that the first
    update already moves.
    """

    steps: int
    then: float | Schedule
    from_factor: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_count("warmup", "steps", self.steps)
        check_rate("warmup", "then", self.then)
        if self.from_factor is not None:
            check_number("warmup", "from_factor", self.from_factor, high=1.0, high_open=False)

    def __call__(self, step: Tensor) -> Tensor:
        step = _floating(step)
        then = self.then if callable(self.then) else Constant(self.then)
        first = 1.0 / (self.steps + 1) if self.from_factor is None else self.from_factor
        factor = (step * ((1.0 - first) / self.steps) + first).clamp(max=1.0)
        return then((step - self.steps).clamp(min=0)) * factor


def warmup_cosine(peak: float, steps: int, warmup: int, end: float = 0.0) -> Warmup:
    """Rises in a straight line to `peak`, then falls along half a cosine wave: for a run whose length is known.

    Args:
        peak: the highest rate.
        steps: of the whole run, the rise among them; with the last one the rate is `end`.
        warmup: steps of the rise; less than one is taken as one.
        end: the last rate.
    """
    warmup = max(1, warmup)
    return Warmup(warmup, Cosine(peak, steps=max(1, steps - warmup), end=end))
