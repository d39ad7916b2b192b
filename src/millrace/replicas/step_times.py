"""How long a member may show no progress: many times what a step usually takes, once one was measured."""

from __future__ import annotations

import statistics
from collections import deque

_FIRST_STEP_S = 120.0  # without the compiler
_COMPILE_S = 3600.0
_LEAST_PATIENCE_S = 2.0
_STEPS_OF_PATIENCE = 10
_KEPT = 50


class StepTimes:
    """Times of the last steps, and what follows from them.

    Args: compile: as for `Session`. patience_s: the answer, once a step was measured; None: ten times the usual step,
        at least 2 s.
    """

    def __init__(self, compile: str, patience_s: float | None) -> None:
        self._compile, self._given_s = compile, patience_s
        self._steps_s: deque[float] = deque(maxlen=_KEPT)

    def add(self, step_s: float) -> None:
        """Note how long a step took."""
        self._steps_s.append(step_s)

    @property
    def first_s(self) -> float:
        """How long to wait for whoever runs a program for the first time."""
        return max(self._given_s or 0.0, _COMPILE_S if self._compile == "inductor" else _FIRST_STEP_S)

    @property
    def patience_s(self) -> float:
        """How long to wait for progress now."""
        if not self._steps_s:
            return self.first_s
        usual_s = statistics.median(self._steps_s)
        return self._given_s or max(_LEAST_PATIENCE_S, _STEPS_OF_PATIENCE * usual_s)
