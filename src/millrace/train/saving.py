"""What a run saves, and how it goes on from that: variables, the place in the data, and what evaluation has found."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from millrace.errors import CheckpointError, SettingError, did_you_mean
from millrace.runtime.checkpoint import VARIABLES, Checkpoint, Checkpoints
from millrace.runtime.commit import Digest
from millrace.runtime.manifest import Json
from millrace.runtime.remote_session import AnySession
from millrace.runtime.save_nodes import SAVE
from millrace.runtime.shard import verify
from millrace.train.early_stopping import StoppingState
from millrace.train.run_directory import RunDirectory


@dataclass(frozen=True)
class Place:
    """How far a run is, beside its variables.

    position: in the data, after the batches trained on. evaluated_step, evaluation: of the last evaluation.
    """

    step: int
    position: Mapping[str, Any]
    evaluated_step: int = -1
    evaluation: Mapping[str, float] = field(default_factory=dict)
    stopping: StoppingState = field(default_factory=StoppingState)


class Saver:
    """The checkpoints of one run, written through the session's save node and read through its restore node."""

    def __init__(
        self, run: RunDirectory, *, keep_last: int, keep_best: int, monitor: str, mode: Literal["min", "max"]
    ) -> None:
        self._run = run
        self._monitor, self._keep_best = monitor, keep_best
        self._session: AnySession | None = None
        self.checkpoints = Checkpoints(
            run.checkpoints, keep_last=keep_last, keep_best=keep_best, best=mode, write=self._write, read=_only_verify
        )
        self._last: tuple[int, int] | None = None  # (step, evaluated_step) of the last save
        self._last_s = time.monotonic()

    def newest(self) -> tuple[Place, Path] | None:
        """Where the newest good checkpoint stood and the file of its variables; None when there is none at all.

        What the run left behind after that step is removed, since it will happen again.
        """
        if not self.checkpoints.steps():
            self._run.rewind(0)
            return None
        found = self.checkpoints.load()
        place = _place_of(found)
        self.checkpoints.rewind(found.step)
        self._run.rewind(found.step)
        self._last = (place.step, place.evaluated_step)
        return place, found.path / VARIABLES

    def save(self, session: AnySession, place: Place) -> Path | None:
        """Begin to write a checkpoint, unless this very state was the last to be saved. Returns its directory."""
        if self._last == (place.step, place.evaluated_step):
            return None
        self._session = session
        extra: dict[str, Json] = {
            "position": place.position,
            "evaluated_step": place.evaluated_step,
            "evaluation": dict(place.evaluation),
            "early_stopping": place.stopping.to_json(),
        }
        metric = place.evaluation.get(self._monitor) if place.evaluated_step == place.step else None
        self.checkpoints.save(place.step, session.variables, extra, metric)
        self._run.mark(place.step)
        self._last, self._last_s = (place.step, place.evaluated_step), time.monotonic()
        return self._run.checkpoints / f"step-{place.step:08d}"

    def check_monitored(self, evaluation: Mapping[str, float]) -> None:
        """Raise SettingError when the evaluation lacks what the best checkpoints are chosen by."""
        if self._keep_best and self._monitor not in evaluation:
            raise SettingError(
                f"monitor={self._monitor!r}: evaluation gives no such value, so the best checkpoint cannot be told. "
                + did_you_mean(self._monitor, list(evaluation))
            )

    @property
    def age_s(self) -> float:
        """Seconds since the last save."""
        return time.monotonic() - self._last_s

    def wait(self) -> None:
        """Until everything is on the disk. Raises: CheckpointError for what could not be written."""
        self.checkpoints.wait()

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> Digest:
        assert self._session is not None
        return self._session.side(SAVE).write(path, tensors)


def _place_of(found: Checkpoint) -> Place:
    try:
        return Place(
            found.step,
            found.extra["position"],
            found.extra["evaluated_step"],
            found.extra["evaluation"],
            StoppingState.from_json(found.extra["early_stopping"]),
        )
    except (LookupError, TypeError) as error:
        raise CheckpointError(
            f"{found.path} does not say where in its data the run was: expected what fit saves, got "
            f"{sorted(found.extra)}. It holds variables all the same: load them, and start a new run."
        ) from error


def _only_verify(path: Path, expected: Digest | None) -> dict[str, Tensor]:
    """Whether a checkpoint's variables are whole; the session's restore node reads them."""
    if expected is not None:
        verify(path, expected)
    return {}
