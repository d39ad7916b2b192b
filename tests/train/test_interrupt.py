"""Ctrl-C and SIGTERM on a real process: the step ends, everything is saved, and how to go on is said."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

import pytest
import torch
from tests.small import child_environment, cross_entropy, labelled, mlp

from millrace import Callback, Checkpoints, RunDirectory, fit
from millrace.train.callbacks import RunView
from millrace.train.interrupt import Interruptible

PROGRAM = """
import os, signal, sys, time, torch, torch.nn.functional as F, millrace
from pathlib import Path

signal.signal(signal.SIGINT, signal.default_int_handler)  # a test started in the background inherits a deaf one
directory, mode = Path(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
model = torch.nn.Linear(4, 3)
x = torch.randn(64, 4)
y = x[:, :3].argmax(1)


class Slow(millrace.Callback):
    def on_step(self, run, step, values):
        if step == 3:
            print("ready", flush=True)
        time.sleep(30 if mode == "stuck" and step == 5 else 0.02)


result = millrace.fit(
    model, (x, y), loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]), optimizer=torch.optim.Adam(model.parameters()),
    batch_size=8, steps=6 if mode == "resume" else 10_000, run_dir=directory, resume=mode == "resume", compile="eager",
    progress=False, callbacks=[Slow()],
)
print(result.outcome, result.steps)
"""


def start(directory: Path, mode: str = "train") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(directory), mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=child_environment(OMP_NUM_THREADS="1"),
        cwd=directory.parent,
    )


def wait_until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_signal_ends_the_run_after_the_step_and_saves_it(number: signal.Signals, tmp_path: Path) -> None:
    process = start(tmp_path / "run")
    wait_until_ready(process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    told = re.search(rf"KeyboardInterrupt: {number.name} after step (\d+): saved; resume with (.*)", errors)
    assert told is not None, errors
    assert told[2] == f"run_dir={str(tmp_path / 'run')!r}, resume=True"
    state = RunDirectory.open(tmp_path / "run").state
    assert (state.status, state.step) == ("interrupted", int(told[1]))
    assert Checkpoints(tmp_path / "run" / "checkpoints").load().step == int(told[1])


def test_a_second_ctrl_c_ends_a_step_that_hangs_and_the_last_checkpoint_serves(tmp_path: Path) -> None:
    process = start(tmp_path / "run", "stuck")
    wait_until_ready(process)
    time.sleep(0.5)  # it is in the step that takes half a minute
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None, "the first one waits for the step"
    told = "SIGINT: what is in work is finished, then all is saved; a second one ends it at once"
    until_s = time.monotonic() + 10.0
    while told not in (tmp_path / "run" / "log.txt").read_text():
        assert time.monotonic() < until_s, "the first one is answered while the step goes on"
        time.sleep(0.05)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode != 0
    assert "To go on from the last checkpoint: run_dir=" in errors
    assert RunDirectory.open(tmp_path / "run").state.status == "interrupted"
    resumed = start(tmp_path / "run", "resume")
    shown, errors = resumed.communicate(timeout=60)
    assert shown.splitlines()[-1] == "finished 6", errors


# -- in this process ---------------------------------------------------------------------------------------------------


def test_the_handlers_of_others_come_back() -> None:
    def mine(number: int, frame: Any) -> None:
        heard.append(number)

    heard: list[int] = []
    before = signal.signal(signal.SIGINT, mine)
    try:
        with Interruptible() as context:
            signal.raise_signal(signal.SIGINT)
            assert (context.asked, heard) == ("SIGINT", [])
            signal.raise_signal(signal.SIGINT)
            assert heard == [signal.SIGINT], "the second one acts as it always does"
        with Interruptible() as context:
            assert context.asked is None
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)


def test_training_in_another_thread_leaves_signals_alone() -> None:
    results: list[Any] = []

    def train() -> None:
        model = mlp()
        results.append(
            fit(
                model,
                [labelled(8)],
                loss=cross_entropy,
                optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
                steps=3,
                compile="eager",
                progress=False,
                run_dir=False,
            )
        )

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert results[0].steps == 3
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_that_keeps_nothing_says_so() -> None:
    class Interrupt(Callback):
        def on_step(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
            if step == 2:
                signal.raise_signal(signal.SIGINT)

    model = mlp()
    with pytest.raises(KeyboardInterrupt, match="SIGINT after step 2: nothing was saved"):
        fit(model, [labelled(8)], loss=cross_entropy, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), steps=9,
            compile="eager", progress=False, run_dir=False, callbacks=[Interrupt()])  # fmt: skip
