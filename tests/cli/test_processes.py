"""The command line as its own process: what only a real one can show (signals, kills, pipes)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.small import child_environment, differing
from torch import Tensor

from millrace.cli.main import CLOSED_PIPE, INTERRUPTED
from millrace.runtime.checkpoint import VARIABLES, Checkpoints
from millrace.zoo.run import configure, find_run, train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals as Linux has them")
STEPS = 60
SETTINGS = [f"steps={STEPS}", "width=8", "compile=eager", "checkpoint_every=3", "evaluate_every=20"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The variables at the end of the same run that nothing happens to."""
    path = tmp_path_factory.mktemp("whole") / "run"
    train(configure("digits", SETTINGS), run_dir=path, progress=False, device="cpu")
    return variables(path)


@pytest.fixture
def started(in_tmp: Path) -> Iterator[subprocess.Popen[str]]:
    """The run, in a process of its own, some steps after its start."""
    process = begin("train", "digits", *[word for text in SETTINGS for word in ("--set", text)], "--device", "cpu")
    try:
        wait_for_step(process, 6)
        yield process
    finally:
        process.kill()
        process.wait()


def begin(*arguments: str) -> subprocess.Popen[str]:
    environment = child_environment(OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "millrace", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(process: subprocess.Popen[str], step: int, timeout_s: float = 200) -> None:
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s and process.poll() is None:
        saved = [path.name for path in Path("runs").glob("*/checkpoints/step-*")]
        if any(name >= f"step-{step:08d}" for name in saved):
            return
        time.sleep(0.005)
    raise AssertionError(f"it did not come to step {step}: {process.communicate()}")


def variables(run: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoints(run / "checkpoints").load()
    assert checkpoint.step == STEPS
    return load_file(checkpoint.path / VARIABLES)


def resumed(*arguments: str) -> dict[str, Any]:
    """`millrace train --resume latest` and its last line."""
    process = begin("train", "--resume", "latest", "--json", "--quiet", *arguments)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    values: dict[str, Any] = json.loads(out.splitlines()[-1])
    return values


def test_ctrl_c_saves_and_says_how_to_go_on(started: subprocess.Popen[str], uninterrupted: dict[str, Tensor]) -> None:
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=200)
    assert started.returncode == INTERRUPTED
    assert out == ""
    run = find_run("latest")
    assert run.state.status == "interrupted"
    assert 6 <= run.state.step < STEPS
    assert err.endswith(f"the run is saved at step {run.state.step}. To go on:\n  millrace resume {run.path}\n")
    assert resumed()["steps"] == STEPS
    assert differing(variables(run.path), uninterrupted) == []


def test_a_killed_run_goes_on_with_the_same_bits(
    started: subprocess.Popen[str], uninterrupted: dict[str, Tensor]
) -> None:
    started.kill()
    started.communicate(timeout=200)
    run = find_run("latest")
    assert run.state.status == "killed"
    assert run.state.step < STEPS
    values = resumed()
    assert values["steps"] == STEPS
    assert values["run_dir"] == str(run.path.resolve())
    assert differing(variables(run.path), uninterrupted) == []


def test_a_reader_who_has_had_enough(in_tmp: Path) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "millrace", "tasks"]
    done = subprocess.run(
        command, env=child_environment(), stdout=writes, stderr=subprocess.PIPE, text=True, timeout=200
    )
    os.close(writes)
    assert (done.returncode, done.stderr) == (CLOSED_PIPE, "")
