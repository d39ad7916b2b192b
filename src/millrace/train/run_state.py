"""state.json: how far a run is, and whether it still goes."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeAlias

from millrace.errors import RunDirectoryError
from millrace.train.directory_lock import is_locked
from millrace.train.run_files import encode_json, read_json, write_atomically

Outcome: TypeAlias = Literal["finished", "interrupted", "failed"]
Status: TypeAlias = Literal["running", "finished", "interrupted", "failed", "killed"]

STATE_NAME = "state.json"


@dataclass(frozen=True)
class RunState:
    """How far a run is. Times are ISO 8601 in UTC, so that they sort as text."""

    status: Status
    pid: int
    host: str
    step: int
    created_at: str
    started_at: str  # of the session that runs, or ran last
    updated_at: str


def started(earlier: RunState | None) -> RunState:
    """The state of a run that this process starts (None), or resumes."""
    now = _now()
    created_at, step = (earlier.created_at, earlier.step) if earlier is not None else (now, 0)
    return RunState("running", os.getpid(), socket.gethostname(), step, created_at, now, now)


def advanced(state: RunState, step: int) -> RunState:
    """The same run, at `step`."""
    return replace(state, step=step, updated_at=_now())


def ended(state: RunState, outcome: Outcome, step: int | None) -> RunState:
    """The same run, over; `step` None leaves the last known one."""
    return replace(state, status=outcome, step=state.step if step is None else step, updated_at=_now())


def read_state(directory: Path) -> RunState:
    """Read state.json in `directory`; "killed" where the run's process ended without saying so (it holds no lock).

    Raises:
        RunDirectoryError: there is none, or it does not describe a run.
    """
    path = directory / STATE_NAME
    fields = read_json(path)
    try:
        state = RunState(**fields)
    except TypeError as error:
        raise RunDirectoryError(
            f"{path} does not describe a run: expected the fields of a run's state, got {fields!r:.200}. "
            "Choose another directory, or delete this one."
        ) from error
    # The lock tells, not the process number: a restarted container gives the same number to another process.
    return replace(state, status="killed") if state.status == "running" and not is_locked(directory) else state


def write_state(directory: Path, state: RunState) -> None:
    """Replace state.json in `directory`."""
    write_atomically(directory / STATE_NAME, encode_json(asdict(state)))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
