"""The settings of a run in one place, checked before anything is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from millrace.compile.tiered import TIERS
from millrace.errors import SettingError, did_you_mean
from millrace.graph.training import PRECISIONS
from millrace.train.early_stopping import EarlyStopping


@dataclass(frozen=True)
class Plan:
    """How to train; `fit` documents each of them.

    Counts are in steps unless named otherwise. None means: choose by the data (an evaluation and a checkpoint at the
    end of every epoch).
    """

    steps: int | None = None
    epochs: int | None = None
    precision: str = "float32"
    schedule: Callable[[Tensor], Tensor] | None = None
    accumulate: int = 1
    compile: str = "tiered"
    steps_per_call: int = 1
    seed: int = 0
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    keep_last: int = 3
    keep_best: int = 1
    monitor: str = "loss"
    mode: Literal["min", "max"] = "min"
    early_stopping: EarlyStopping | None = None
    log_every: int = 10
    progress: bool = True
    run_dir: str | Path | bool = True
    resume: bool = False

    def __post_init__(self) -> None:
        if self.steps is None and self.epochs is None:
            raise SettingError("fit needs to know when to stop: pass steps=… or epochs=… (or both)")
        counts = ("steps", "epochs", "accumulate", "steps_per_call", "evaluate_every", "checkpoint_every", "log_every")
        for name in counts:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise SettingError(f"{name}={value!r}: expected a whole number of at least 1")
        for name, known in (("compile", TIERS), ("precision", tuple(PRECISIONS)), ("mode", ("min", "max"))):
            if getattr(self, name) not in known:
                raise SettingError(
                    f"{name}={getattr(self, name)!r}: expected one of {', '.join(known)}. "
                    + did_you_mean(str(getattr(self, name)), list(known))
                )
        if self.resume and isinstance(self.run_dir, bool):
            raise SettingError("resume=True needs the run to go on with: pass run_dir='runs/…'")

    def as_config(self) -> dict[str, Any]:
        """The settings as JSON values, for config.json."""
        plain = {}
        for field in fields(self):
            value = getattr(self, field.name)
            plain[field.name] = value if isinstance(value, int | float | str | type(None)) else repr(value)
        return plain
