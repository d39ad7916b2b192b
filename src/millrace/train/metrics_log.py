"""metrics.jsonl: one JSON object per line, appended; readable and free of repeats through kills and resumes."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat, TypeAlias

from millrace.errors import RunDirectoryError, SettingError
from millrace.train.metrics import read_scalar
from millrace.train.run_files import write_atomically

Record: TypeAlias = dict[str, float | int]

RESERVED = ("step", "time_s")
# JSON has no such numbers, and readers such as jq reject the bare words that Python would write.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsLog:
    """The writer of one metrics.jsonl. Every line is handed to the kernel at once, so a kill loses none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def append(self, step: int, values: Mapping[str, SupportsFloat], time_s: float) -> None:
        """Add one line.

        Args:
            step: the step after which the values were measured.
            values: by name; tensors are read, which waits for their device.
            time_s: seconds since the epoch.

        Raises:
            SettingError: a value has the name of one of the line's own fields.
            RunDirectoryError: it cannot be written; the file is as it was before.
        """
        line = format_line(step, values, time_s)
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            _append_whole(self._descriptor, line)
        except OSError as error:
            raise RunDirectoryError(
                f"Cannot append to {self._path}: {error.strerror or error}. The lines so far are whole. "
                "Free some space or permit writing there, then resume."
            ) from error

    def rewind(self, last_step: int | None) -> int:
        """Drop the lines of steps after `last_step`, and damaged ones; None drops damaged ones only.

        A run that was killed has written lines after its last checkpoint. Resumed, it makes these steps again.

        Args:
            last_step: the step of the checkpoint that the run goes on from.

        Returns:
            How many lines were dropped.

        Raises:
            RunDirectoryError: the file cannot be rewritten; it is as it was before.
        """
        self.close()
        if not self._path.exists():
            return 0
        content = self._path.read_bytes()
        kept = kept_lines(content, last_step)
        if kept != content:
            write_atomically(self._path, kept)
        return len(content.splitlines()) - len(kept.splitlines())

    def close(self) -> None:
        """Close the file; the next `append` opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def format_line(step: int, values: Mapping[str, SupportsFloat], time_s: float) -> bytes:
    """One line of metrics.jsonl, with its line end."""
    record: dict[str, float | str] = {"step": step, "time_s": round(time_s, 3)}
    for name, value in values.items():
        if name in RESERVED:
            raise SettingError(
                f"A metric is called {name!r}, which is a field of every line in metrics.jsonl: rename the metric."
            )
        record[name] = _finite_or_word(read_scalar(value))
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def kept_lines(content: bytes, last_step: int | None) -> bytes:
    """The whole lines of `content` whose step is at most `last_step` (None: any), in their order."""
    kept = []
    for line in content.split(b"\n"):
        record = _parse(line)
        if record is not None and (last_step is None or record["step"] <= last_step):
            kept.append(line + b"\n")
    return b"".join(kept)


def read_metrics(path: Path) -> list[Record]:
    """The lines of a metrics.jsonl, oldest first; a last line cut short by a kill is left out.

    Args:
        path: the file; where there is none, nothing has been measured yet.

    Raises:
        RunDirectoryError: a line before the last is damaged; the message names it.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise RunDirectoryError(
                f"{path}, line {number}: expected a JSON object with an integer 'step', got {line[:60]!r}. "
                "Repair or delete that line; resuming the run deletes it too."
            )
    return records


def parse_lines(content: bytes) -> list[Record]:
    """The records of those lines that are whole."""
    return [record for record in map(_parse, content.split(b"\n")) if record is not None]


def _append_whole(descriptor: int, line: bytes) -> None:
    size_bytes = os.fstat(descriptor).st_size
    try:
        if os.write(descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        os.ftruncate(descriptor, size_bytes)
        raise


def _parse(line: bytes) -> Record | None:
    try:
        record: Any = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    return {name: _number(value) for name, value in record.items()}


def _number(value: Any) -> Any:
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _finite_or_word(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
