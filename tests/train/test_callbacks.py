"""Dispatch to callbacks, and what happens when one raises."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import SupportsFloat

import pytest

from millrace.train.callbacks import Callback, CallbackList, RunView
from millrace.train.run_state import Outcome


class FakeRun:
    directory: Path | None = None
    step = 12
    stopped = False

    def stop(self) -> None:
        self.stopped = True


class Recorder(Callback):
    """Writes down what it is told."""

    def __init__(self, heard: list[tuple[object, ...]], name: str) -> None:
        self.heard, self.name = heard, name

    def on_start(self, run: RunView) -> None:
        self.heard.append((self.name, "start"))

    def on_step(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
        self.heard.append((self.name, "step", step, values))

    def on_evaluate(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
        self.heard.append((self.name, "evaluate", step, values))
        if float(values["loss"]) < 1:
            run.stop()

    def on_checkpoint(self, run: RunView, step: int, path: Path) -> None:
        self.heard.append((self.name, "checkpoint", step, path))

    def on_end(self, run: RunView, outcome: Outcome) -> None:
        self.heard.append((self.name, "end", outcome))


class Failing(Callback):
    """Raises in every hook it overrides."""

    def on_step(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
        raise KeyError("volume")

    def on_end(self, run: RunView, outcome: Outcome) -> None:
        raise ValueError("at the end")


def test_every_callback_hears_every_event_in_order_and_can_stop_the_run() -> None:
    heard: list[tuple[object, ...]] = []
    run = FakeRun()
    callbacks = CallbackList([Recorder(heard, "a"), Callback(), Recorder(heard, "b")])
    callbacks.on_start(run)
    callbacks.on_step(run, 1, {"loss": 2.0})
    callbacks.on_checkpoint(run, 1, Path("c"))
    assert not run.stopped
    callbacks.on_evaluate(run, 1, {"loss": 0.5})
    assert run.stopped
    callbacks.on_end(run, "finished")
    events = [
        ("start",),
        ("step", 1, {"loss": 2.0}),
        ("checkpoint", 1, Path("c")),
        ("evaluate", 1, {"loss": 0.5}),
        ("end", "finished"),
    ]
    assert heard == [(name, *event) for event in events for name in "ab"]


def test_an_error_keeps_its_type_and_names_the_callback_and_the_step() -> None:
    with pytest.raises(KeyError, match="volume") as caught:
        CallbackList([Callback(), Failing()]).on_step(FakeRun(), 12, {})
    assert caught.value.__notes__ == ["raised in on_step of callback Failing, at step 12"]


def test_all_hear_of_the_end_though_one_fails() -> None:
    heard: list[tuple[object, ...]] = []
    with pytest.raises(ValueError, match="at the end"):
        CallbackList([Failing(), Recorder(heard, "a")]).on_end(FakeRun(), "failed")
    assert heard == [("a", "end", "failed")]
