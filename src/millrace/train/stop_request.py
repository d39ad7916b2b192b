"""The file `stop` in a run's directory: whoever puts it there asks the run to end after its step, and to save.

A file and not a signal, as it can be asked for twice without harm, from another machine that shares the directory, and
of a run in a thread. The run looks for it between steps.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from millrace.errors import RunDirectoryError

STOP_NAME = "stop"
_EVERY_S = 0.2


def request_stop(directory: Path) -> None:
    """Ask the run in `directory` to stop. Raises: RunDirectoryError when the directory cannot be written."""
    try:
        (directory / STOP_NAME).touch()
    except OSError as error:
        raise RunDirectoryError(
            f"Cannot write {directory / STOP_NAME}, by which a run is asked to stop: {error.strerror or error}. "
            "Permit that, or stop the run's process by SIGINT."
        ) from error


def withdraw_stop(directory: Path) -> None:
    """Forget that the run was asked to stop."""
    (directory / STOP_NAME).unlink(missing_ok=True)


class StopRequest:
    """Whether the run in `directory` (None: a run that keeps none) was asked to stop; looks a few times a second."""

    def __init__(self, directory: Path | None) -> None:
        self._path = None if directory is None else directory / STOP_NAME
        self._next_s = 0.0
        self._found = False

    def __call__(self) -> bool:
        if self._path is not None and not self._found and time.monotonic() >= self._next_s:
            with suppress(OSError):  # the directory may be out of reach for a while, which is no reason to end
                self._found = self._path.exists()
            self._next_s = time.monotonic() + _EVERY_S
        return self._found
