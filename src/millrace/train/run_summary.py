"""A run in one line: how far it is, how it goes, and since when."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from millrace.train.metrics_log import Record, parse_lines
from millrace.train.run_directory import RunDirectory

_TAIL_BYTES = 2**16
_INTERVALS = 10  # logged ones that the rate is taken over


@dataclass(frozen=True)
class RunSummary:
    """What `millrace runs` shows of a run.

    status: a `run_state.Status`, or "waiting" for one that was submitted and has not begun.
    loss: of training, when it was last logged. steps_per_s: over the last lines that were logged, evaluations and all.
    started_s, updated_s: since the epoch; when it was started or resumed last, and when it last wrote something.
    """

    name: str
    path: Path
    status: str
    step: int
    loss: float | None
    steps_per_s: float | None
    started_s: float
    updated_s: float


def summarize(run: RunDirectory) -> RunSummary:
    """The present state of a run.

    Raises: RunDirectoryError when its directory is damaged.
    """
    state, records = run.state, _last_records(run.metrics_path)
    started_s = datetime.fromisoformat(state.started_at).timestamp()
    updated_s = datetime.fromisoformat(state.updated_at).timestamp()
    last = records[-1] if records else None
    losses = [record["loss"] for record in records if "loss" in record]
    return RunSummary(
        run.name,
        run.path,
        state.status,
        max(state.step, int(last["step"]) if last else 0),
        losses[-1] if losses else None,
        steps_per_s([record for record in records if record["time_s"] >= started_s]),
        started_s,
        max(updated_s, last["time_s"] if last else 0.0),
    )


def steps_per_s(records: Sequence[Record]) -> float | None:
    """The rate over the last lines of metrics, of one session; None where two are not there yet."""
    logged = [record for record in records if "loss" in record][-_INTERVALS - 1 :]
    if len(logged) < 2:
        return None
    took_s = logged[-1]["time_s"] - logged[0]["time_s"]
    return (logged[-1]["step"] - logged[0]["step"]) / took_s if took_s > 0 else None


def _last_records(path: Path) -> list[Record]:
    """The last lines of a metrics.jsonl, however long it is."""
    try:
        with open(path, "rb") as file:
            begin = max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES)
            file.seek(begin)
            content = file.read()
    except FileNotFoundError:
        return []
    return parse_lines(content.partition(b"\n")[2] if begin else content)
