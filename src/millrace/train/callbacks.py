"""Hooks of the user's own into a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, SupportsFloat

from millrace.train.run_state import Outcome


class RunView(Protocol):
    """What a callback sees of the run, and what it can ask of it."""

    @property
    def directory(self) -> Path | None:
        """The run directory; None for a run that keeps none."""

    @property
    def step(self) -> int:
        """Steps done so far."""

    def stop(self) -> None:
        """Ask the run to end after this step, as finished."""

    def pull(self) -> None:
        """Have the user's module hold the present weights, wherever they are trained.

        Where several batches are in work at once (asynchronous replicas), these are finished first.
        """

    def resize(self, replicas: int) -> None:
        """From the next step on, train in so many replicas (of `Hybrid`: in so many groups).

        Those who come are started meanwhile and take the variables from others; the last ones end when they have pushed
        what they are at. Raises: SettingError for a run without replicas, or where it is no number of them.
        """


class Callback:
    """Override what you need; every hook does nothing by itself.

    Values may be tensors on their device: reading one with `float()` waits for the device, so do not read every
    step's on a GPU.
    """

    def on_start(self, run: RunView) -> None:
        """Before the first step (or the first after a resume)."""

    def on_step(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """After step `step`, with its loss and metrics."""

    def on_evaluate(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """After an evaluation, with its means."""

    def on_checkpoint(self, run: RunView, step: int, path: Path) -> None:
        """After a checkpoint is whole on disk."""

    def on_end(self, run: RunView, outcome: Outcome) -> None:
        """After the last step, however the run ended."""


class CallbackList(Callback):
    """Calls each of several callbacks in their order.

    An exception in a hook ends the run; it keeps its type, and a note says which callback raised it and when.
    """

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        self._callbacks = tuple(callbacks)

    def __len__(self) -> int:
        return len(self._callbacks)

    def on_start(self, run: RunView) -> None:
        for callback in self._callbacks:
            with _named(callback, "on_start", run):
                callback.on_start(run)

    def on_step(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
        for callback in self._callbacks:
            with _named(callback, "on_step", run):
                callback.on_step(run, step, values)

    def on_evaluate(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
        for callback in self._callbacks:
            with _named(callback, "on_evaluate", run):
                callback.on_evaluate(run, step, values)

    def on_checkpoint(self, run: RunView, step: int, path: Path) -> None:
        for callback in self._callbacks:
            with _named(callback, "on_checkpoint", run):
                callback.on_checkpoint(run, step, path)

    def on_end(self, run: RunView, outcome: Outcome) -> None:
        """Every callback hears of the end, also when an earlier one raises; the first exception is raised after."""
        first: BaseException | None = None
        for callback in self._callbacks:
            try:
                with _named(callback, "on_end", run):
                    callback.on_end(run, outcome)
            except BaseException as error:
                first = first or error
        if first is not None:
            raise first


@contextmanager
def _named(callback: Callback, hook: str, run: RunView) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        error.add_note(f"raised in {hook} of callback {type(callback).__qualname__}, at step {run.step}")
        raise
