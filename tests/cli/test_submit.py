"""`millrace submit`, and the commands on submitted runs, with a real Ray cluster and its token."""

from __future__ import annotations

import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.ray_head import Head, ray_head

from millrace.cli.main import OK, USAGE

pytestmark = [pytest.mark.long, pytest.mark.cluster, pytest.mark.slow]
SETTINGS = ["--set", "width=4", "--set", "compile=eager", "--set", "epochs=none", "--device", "cpu"]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A cluster of three cores, which wants a token."""
    pytest.importorskip("ray")
    pytest.importorskip("aiohttp")  # of ray[default]
    with ray_head(tmp_path_factory.mktemp("h"), cpus=3, token=secrets.token_hex(32), dashboard=True) as started:
        yield started


def millrace(head: Head, *arguments: str, status: int = OK, **environment: str) -> str:
    """Run a command; what it said."""
    command = [sys.executable, "-m", "millrace", *arguments, "--cluster", head.dashboard]
    variables = {**head.environment, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def until_listed(head: Head, run: str, state: str, step: int = 0) -> int:
    """Wait until a run is so far. Returns: its step."""
    end_s = time.monotonic() + 300
    while True:
        shown = millrace(head, "runs")
        words = next(line.split() for line in shown.splitlines() if line.startswith(run))
        if words[1] == state and int(words[2]) >= step:
            return int(words[2])
        assert time.monotonic() < end_s, shown + millrace(head, "logs", run)
        time.sleep(0.5)


def submitted(head: Head, runs: Path, *arguments: str) -> tuple[str, str]:
    """Its name, and what was said."""
    said = millrace(head, "submit", "digits", *SETTINGS, "--runs-dir", str(runs), *arguments)
    return next(line.split()[0] for line in said.splitlines() if "was submitted" in line), said


def test_runs_share_a_cluster_are_stopped_and_go_on(head: Head, tmp_path: Path) -> None:
    long, _ = submitted(head, tmp_path, "--replicas", "1", "--set", "steps=100000")
    until_listed(head, long, "running", step=1)
    short, said = submitted(head, tmp_path, "--set", "steps=20")
    assert "it waits: it asks for 1 CPU; Ray at" in said
    assert f"3 CPU, 0 GPU on 1 machines. Before it: {long} (1 CPU and 2 for its replicas' processes)" in said
    refused = millrace(head, "submit", "digits", *SETTINGS, "--cpus", "9", status=USAGE)
    assert "the run asks for 9 CPU, and Ray at" in refused
    assert "it would wait for ever" in refused

    stopped = millrace(head, "stop", long)
    assert f"{long} is interrupted at step " in stopped
    step = int(stopped.partition(" at step ")[2].partition(".")[0])
    assert step >= 1
    assert "the run is saved at step" in millrace(head, "logs", long)
    until_listed(head, short, "finished", step=20)

    assert "goes on" in millrace(head, "resume", long, "--set", f"steps={step + 5}")
    until_listed(head, long, "finished", step=step + 5)
    assert "resumed" in millrace(head, "logs", long)
    assert "test accuracy" in millrace(head, "logs", long, "--follow")


def test_a_run_is_killed(head: Head, tmp_path: Path) -> None:
    run, _ = submitted(head, tmp_path, "--set", "steps=100000")
    until_listed(head, run, "running", step=1)
    assert f"{run} is killed at step" in millrace(head, "stop", run, "--force")


def test_who_has_no_token_is_refused(head: Head) -> None:
    for token in (secrets.token_hex(32), ""):
        said = millrace(head, "runs", status=USAGE, RAY_AUTH_TOKEN=token, HOME="/nonexistent")
        assert f"Ray at {head.dashboard} refuses us" in said
        assert "RAY_AUTH_TOKEN_PATH=FILE" in said


def test_where_no_cluster_is(head: Head) -> None:
    for address, message in (
        ("http://127.0.0.1:1", "nobody answers at http://127.0.0.1:1"),
        ("somewhere", "'somewhere' is none that takes jobs: expected http://HOST:8265"),
        (f"http://{head.address}", f"Ray's jobs at http://{head.address} do not answer"),
    ):
        said = millrace(Head(head.address, address, head.environment), "runs", status=USAGE)
        assert message in said
