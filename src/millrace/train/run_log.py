"""log.txt: what a run said, with the time of each line; appended, and kept through kills and resumes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

LOG_NAME = "log.txt"
_BLOCK_BYTES = 2**16


class RunLog:
    """The writer of one log.txt. Every line is handed to the kernel whole, so lines of several threads do not mix."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def append(self, text: str) -> None:
        """Add a line, or several where the text has several. What cannot be written is left out: a run that trains is
        not to end for want of a line that tells so."""
        with contextlib.suppress(OSError):
            if self._descriptor is None:
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.write(self._descriptor, format_line(text, datetime.now(UTC)))

    def close(self) -> None:
        """Close the file; the next `append` opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def format_line(text: str, now: datetime) -> bytes:
    """A text as it stands in log.txt: the time in front, further lines indented."""
    first, *others = text.splitlines() or [""]
    return "".join([f"{now:%Y-%m-%d %H:%M:%S} {first}\n", *(f"    {line}\n" for line in others)]).encode()


class LogReader:
    """Reads a log.txt from its beginning, or what was added since the last time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_bytes = 0

    def new(self) -> Iterator[str]:
        """What is new, in pieces; of a line that is being written, the part that is there."""
        with contextlib.suppress(FileNotFoundError), open(self._path, "rb") as file:
            file.seek(self._read_bytes)
            while block := file.read(_BLOCK_BYTES):
                self._read_bytes += len(block)
                yield block.decode(errors="replace")
