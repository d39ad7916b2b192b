"""A driver that is killed leaves nothing behind but its run, and that can be gone on with."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.train.driver_to_kill import STEPS, train

from millrace.errors import RunDirectoryError
from millrace.train.run_directory import RunDirectory

DRIVER = Path(__file__).with_name("driver_to_kill.py")
MARK = "MILLRACE_TEST_MARK"
START_S = 150.0  # a Ray on a busy machine


def marked(mark: str) -> list[int]:
    """Living processes that were begun by one with this mark in its environment, and itself."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def until(done: Callable[[], bool], within_s: float) -> float:
    """Seconds that it took."""
    began_s = time.monotonic()
    while not done():
        assert time.monotonic() - began_s < within_s
        time.sleep(0.02)
    return time.monotonic() - began_s


def saved(directory: Path) -> int:
    with contextlib.suppress(RunDirectoryError, OSError):
        return max((int(path.name[5:]) for path in (directory / "checkpoints").glob("step-????????")), default=0)
    return 0


@contextlib.contextmanager
def driver(directory: Path, update: str, *cluster: str) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """A driver that has begun, its mark, and where all its processes put their temporary files."""
    mark = secrets.token_hex(16)
    temporary = Path(tempfile.mkdtemp(prefix="mr-", dir="/tmp"))
    paths = os.pathsep.join(filter(None, sys.path))
    variables = {MARK: mark, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    with open(directory.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(DRIVER), str(directory), update, *cluster],
            env={**os.environ, **variables},
            stdout=log,
            stderr=log,
        )
    try:
        until(lambda: saved(directory) >= 8 or process.poll() is not None, START_S)
        assert process.poll() is None, directory.with_suffix(".log").read_text()
        yield process, mark, temporary
    finally:
        process.kill()
        process.wait()
        for pid in marked(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.mark.parametrize(
    ("update", "cluster"),
    [
        ("sync", ()),
        pytest.param("servers", (), marks=pytest.mark.long),
        pytest.param("async", (), marks=pytest.mark.long),
        pytest.param("sync", ("local",), marks=[pytest.mark.long, pytest.mark.cluster]),
        pytest.param("servers", ("local",), marks=[pytest.mark.long, pytest.mark.cluster]),
    ],
)
def test_what_a_killed_driver_began_ends_with_it_and_its_run_goes_on(
    update: str, cluster: tuple[str, ...], tmp_path: Path
) -> None:
    if cluster and importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    run = tmp_path / "run"
    with driver(run, update, *cluster) as (process, mark, temporary):
        assert len(marked(mark)) >= 4  # itself, two workers, a spare
        assert list(temporary.iterdir())
        process.kill()
        took_s = until(lambda: all(pid == process.pid for pid in marked(mark)), 10.0 if cluster else 3.0)
        print(f"{update} {cluster}: all ended {took_s:.2f} s after the driver")
        assert not list(temporary.iterdir())  # sockets, logs, Ray's files
    assert RunDirectory.open(run).state.status == "killed"
    assert saved(run) < STEPS
    result, found = train(run, update, slow=False)
    assert (result.outcome, result.steps) == ("finished", STEPS)
    if update != "async":
        _, expected = train(tmp_path / "whole", update, slow=False)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
