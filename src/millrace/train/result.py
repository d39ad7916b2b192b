"""What a finished run leaves in the hands of its caller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from millrace.train.run_state import Outcome


@dataclass(frozen=True)
class Result:
    """How a run ended.

    values: mean training loss and metrics since they were last logged. evaluation: of the last evaluation, empty
    without validation data. train_s: seconds in the loop, evaluations and checkpoints included. first_step_s: from the
    call of `fit` to the end of the first step (tracing included). tier: what ran the last step.
    mean_staleness: of a run over parameter servers, how many updates came between an update's fetch and its turn.
    repeats: how many batches or slices of such a run were computed again, as their process was lost. dropped: how many
    gradients of backup workers came too late. restarts: how often the run went back to its last checkpoint, as all
    processes that held some variables were lost. lost_updates: how many updates that cost.
    """

    outcome: Outcome
    steps: int
    epochs: int
    values: Mapping[str, float] = field(default_factory=dict)
    evaluation: Mapping[str, float] = field(default_factory=dict)
    train_s: float = 0.0
    first_step_s: float = 0.0
    tier: str = "eager"
    run_dir: Path | None = None
    mean_staleness: float = 0.0
    repeats: int = 0
    dropped: int = 0
    restarts: int = 0
    lost_updates: int = 0
