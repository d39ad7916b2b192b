"""Ctrl-C and termination between steps, never within one, so that what is saved is whole."""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class Interruptible:
    """A context in which the first SIGINT or SIGTERM only sets `asked`; a second one acts as it always does.

    Outside the main thread, where handlers cannot be set, signals are left alone.

    requested: whether somebody asks for the same in another way. at_once: whether there is nothing to save yet, so that
    already the first signal ends what is done. noted: told who asked, in a thread of its own: a handler may have come
    between any two instructions of the main thread, also where that holds a lock or is writing.
    """

    def __init__(
        self,
        requested: Callable[[], bool] = lambda: False,
        at_once: Callable[[], bool] = lambda: False,
        noted: Callable[[str], None] = lambda asked: None,
    ) -> None:
        self._requested = requested
        self._at_once = at_once
        self._noted = noted
        self._asked: str | None = None
        self._saved: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> str | None:
        """Who asked for the end, such as "SIGINT"; None for nobody."""
        if self._asked is None and self._requested():
            self._asked = "millrace stop"
        return self._asked

    def __enter__(self) -> Interruptible:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # None: a handler that was not set from Python, which cannot be put back.
                self._saved[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = signal.Signals(number).name
        self._restore()
        if self._at_once():
            raise KeyboardInterrupt(f"{self._asked} before the first step")
        # Not `threading.Thread`, whose start takes a lock that the main thread may be holding.
        _thread.start_new_thread(self._noted, (self._asked,))

    def _restore(self) -> None:
        for number, handler in self._saved.items():
            signal.signal(number, handler)
        self._saved.clear()
