"""What a quick model before a slow one saves, where the slow one is asked only for what the quick one lets pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Cascade:
    """Seconds for an example, and which share of the examples the quick model lets pass."""

    quick_s: float
    slow_s: float
    passed: float

    @property
    def saved(self) -> float:
        """The share of the time that asking the slow model for every example would take; below 0, it costs."""
        return 1 - (self.quick_s + self.passed * self.slow_s) / self.slow_s


def seconds_each(work: Callable[[T], Any], examples: Sequence[T], turns: int = 3) -> float:
    """How long the work takes for one example, asked for one by one: the least of some turns, in seconds."""
    taken_s = []
    for _ in range(turns):
        begin = time.perf_counter()
        for example in examples:
            work(example)
        taken_s.append(time.perf_counter() - begin)
    return min(taken_s) / len(examples)
