"""What a run's lines of progress tell to a program: `Progress` writes them where there is no terminal, as in a job."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TRAINING = re.compile(r"^step (\d+)(?:/\d+)?  ")
_OTHER = re.compile(r"^step (\d+): |the run is saved at step (\d+)")
_LOSS = re.compile(r"  loss (\S+)")
_RATE = re.compile(r"  ([\d.e+-]+)([kM]?) steps/s")
_UNITS = {"": 1.0, "k": 1e3, "M": 1e6}


@dataclass(frozen=True)
class LastProgress:
    """Of the last lines that tell it; None where none does."""

    step: int = 0
    loss: float | None = None
    steps_per_s: float | None = None


def last_progress(log: str) -> LastProgress:
    """How far a run is, by what it has written."""
    step, loss, rate = 0, None, None
    for line in log.splitlines():
        if found := _OTHER.search(line):
            step = int(found[1] or found[2])
        if found := _TRAINING.match(line):
            step = int(found[1])
            if found := _LOSS.search(line):
                loss = float(found[1])
            if found := _RATE.search(line):
                rate = float(found[1]) * _UNITS[found[2]]
    return LastProgress(step, loss, rate)
