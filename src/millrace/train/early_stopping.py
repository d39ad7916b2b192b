"""When to stop because evaluation no longer gets better: a pure state machine, whose state goes into checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from millrace.errors import SettingError, did_you_mean


@dataclass(frozen=True)
class StoppingState:
    """What early stopping remembers between evaluations."""

    best: float | None = None  # None: no finite value was seen yet
    best_step: int | None = None
    worse_in_a_row: int = 0  # evaluations since the best one

    def to_json(self) -> dict[str, float | int | None]:
        """The state as JSON-able fields."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> StoppingState:
        """The inverse of `to_json`."""
        return cls(**fields)


@dataclass(frozen=True)
class Decision:
    """What follows from one evaluation."""

    state: StoppingState
    stop: bool
    improved: bool


@dataclass(frozen=True)
class EarlyStopping:
    """Stop after `patience` evaluations in a row without a new best value of `metric`.

    Args:
        metric: the name of an evaluated value.
        patience: evaluations, at least 1.
        mode: "min" where less is better (a loss), "max" where more is (an accuracy).
        min_delta: what a value must gain on the best one to count as better, in the metric's unit; at least 0.

    Raises:
        SettingError: an argument is out of its range.
    """

    metric: str = "loss"
    patience: int = 5
    mode: Literal["min", "max"] = "min"
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise SettingError(f"EarlyStopping: mode must be 'min' or 'max', got {self.mode!r}.")
        if self.patience < 1:
            raise SettingError(f"EarlyStopping: patience must be at least 1 evaluation, got {self.patience!r}.")
        if not self.min_delta >= 0:
            raise SettingError(f"EarlyStopping: min_delta must be at least 0, got {self.min_delta!r}.")

    def observe(self, state: StoppingState, value: float, step: int) -> Decision:
        """Take in one evaluation.

        Args:
            state: what the last decision returned; `StoppingState()` at first.
            value: of the metric; NaN and infinities are never better than anything.
            step: the step after which it was measured.

        Returns:
            The new state, whether to stop, and whether this is the best value so far.
        """
        if math.isfinite(value) and (state.best is None or self._gain(state.best, value)):
            return Decision(StoppingState(value, step, 0), stop=False, improved=True)
        worse = state.worse_in_a_row + 1
        return Decision(StoppingState(state.best, state.best_step, worse), stop=worse >= self.patience, improved=False)

    def value_in(self, values: Mapping[str, float]) -> float:
        """This metric among all that were evaluated.

        Raises:
            SettingError: it was not evaluated; the message suggests those that were.
        """
        if self.metric not in values:
            raise SettingError(
                f"EarlyStopping watches {self.metric!r}, which evaluation does not give. "
                + did_you_mean(self.metric, list(values))
            )
        return float(values[self.metric])

    def _gain(self, best: float, value: float) -> bool:
        gain = best - value if self.mode == "min" else value - best
        return gain > self.min_delta
