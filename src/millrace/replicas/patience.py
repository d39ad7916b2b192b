"""Waiting for other processes, never without an end: a deadline, and a way to be told that it is no use."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from millrace.errors import WorkerError

_FIRST_SLEEP_S = 20e-6
_LONGEST_SLEEP_S = 1e-3
_GROWTH = 1.5

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """Who waits, and when it ends.

    who: names the waiting process in messages. abandoned: whether the driver has said that the group is given up; asked
    at least every millisecond, by the thread that waits. timeout_s: the longest wait.
    """

    who: str
    abandoned: Callable[[], bool]
    timeout_s: float

    def until(self, done: Callable[[], bool], what: Callable[[], str], spin_s: float = 0.0) -> None:
        """Return when `done()`.

        Args: what: what is waited for, asked only when the wait fails. spin_s: look for that long before sleeping.
        Raises: WorkerError when the group was abandoned, or the time is over.
        """
        if done():
            return
        begun_s = time.monotonic()
        while time.monotonic() - begun_s < spin_s:
            os.sched_yield()
            if done():
                return
        sleep_s = _FIRST_SLEEP_S
        while not done():
            waited_s = time.monotonic() - begun_s
            if self.abandoned():
                raise WorkerError(
                    f"{self.who}: its group was abandoned while it waited for {what()} (for {waited_s:.3g} s). "
                    "Take part in the next generation; what was being reduced is lost."
                )
            if waited_s > self.timeout_s:
                raise WorkerError(
                    f"{self.who} waited {self.timeout_s:g} s for {what()}. Another rank is dead, stuck or slower than "
                    "that: look at what the others do, or allow more time."
                )
            time.sleep(sleep_s)
            sleep_s = min(sleep_s * _GROWTH, _LONGEST_SLEEP_S)

    def call(self, function: Callable[[], T], what: str) -> T:
        """The result of a function that may block for longer than this allows.

        It runs in a thread, which is left behind when the wait fails; the function should have an end of its own.

        Raises: WorkerError as `until`, or when the function raises a RuntimeError, with what it said.
        """
        attempt = _Attempt(function)
        threading.Thread(target=attempt.run, daemon=True, name="millrace-attempt").start()
        self.until(attempt.ended.is_set, lambda: what)
        if attempt.error is None:
            return attempt.result
        if isinstance(attempt.error, RuntimeError):
            first_line = str(attempt.error).partition("\n")[0].strip()
            raise WorkerError(f"{self.who}: {what} failed: {first_line}") from attempt.error
        raise attempt.error


class _Attempt(Generic[T]):
    """A call in a thread of its own, and how it ended."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self.ended = threading.Event()
        self.error: BaseException | None = None
        self.result: T

    def run(self) -> None:
        try:
            self.result = self._function()
        except BaseException as error:  # it is raised where the call is waited for
            self.error = error
        self.ended.set()
