"""`millrace runs`, `logs`, `stop` and `resume`, on runs in processes of their own."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.small import child_environment

from millrace.cli.main import FAILED, INTERRUPTED, OK, USAGE, main
from millrace.cli.runs import ago
from millrace.train.run_directory import RunDirectory
from millrace.train.run_state import read_state

LONG = ["steps=100000", "width=4", "compile=eager", "batch_size=8"]
Captured = pytest.CaptureFixture[str]


def until_step(run: Path, step: int) -> None:
    end_s = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or RunDirectory(run).read_metrics()[-1]["step"] < step:
        assert time.monotonic() < end_s
        time.sleep(0.02)


def started(run: Path) -> subprocess.Popen[str]:
    """A long run of digits, in a process of its own."""
    command = [sys.executable, "-m", "millrace", "train", "digits", "--quiet", "--device", "cpu", "--run-dir", str(run)]
    settings = [word for text in LONG for word in ("--set", text)]
    return subprocess.Popen([*command, *settings], env=child_environment(), stderr=subprocess.PIPE, text=True)


@pytest.fixture
def running(in_tmp: Path) -> Iterator[subprocess.Popen[str]]:
    """The run "digits-long", some steps after its start."""
    process = started(in_tmp / "runs" / "digits-long")
    try:
        until_step(in_tmp / "runs" / "digits-long", 20)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_run_is_listed_followed_stopped_and_resumed(running: subprocess.Popen[str], capsys: Captured) -> None:
    assert main(["runs", "--json"]) == OK
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["run", "state", "step", "loss", "steps/s", "started"]
    assert shown[1].split()[:2] == ["digits-long", "running"]
    (listed,) = json.loads(shown[-1])["runs"]
    assert listed["step"] >= 20
    assert listed["loss"] > 0
    assert listed["steps_per_s"] > 0

    following = threading.Thread(target=main, args=(["logs", "digits-l", "--follow"],))
    following.start()
    assert main(["stop", "digits"]) == OK
    following.join(20)
    assert not following.is_alive()
    captured = capsys.readouterr()
    assert running.wait(60) == INTERRUPTED
    state = read_state(Path("runs/digits-long"))
    assert state.status == "interrupted"
    assert f"digits-long is interrupted at step {state.step}. To go on: millrace resume" in captured.out
    assert "was asked to stop" in captured.err
    assert f"started in process {running.pid} on {socket.gethostname()}" in captured.out
    assert "step 20: loss " in captured.out
    assert f"interrupted at step {state.step}\n" in captured.out
    assert not Path("runs/digits-long/stop").exists()

    assert main(["stop", "digits-long"]) == OK
    assert f"does not run: it is interrupted, at step {state.step}" in capsys.readouterr().out
    assert main(["resume", "digits-long", "--set", f"steps={state.step + 7}", "--quiet"]) == OK
    assert f"7 steps after the first {state.step} in" in capsys.readouterr().out
    assert main(["logs", "latest"]) == OK
    assert f"finished at step {state.step + 7}" in capsys.readouterr().out


@pytest.mark.long
def test_a_run_that_cannot_stop_is_waited_for_in_vain_and_killed(in_tmp: Path, capsys: Captured) -> None:
    process = started(Path("runs/stuck"))
    try:
        until_step(Path("runs/stuck"), 10)
        process.send_signal(signal.SIGSTOP)
        assert main(["stop", "stuck", "--wait", "0.3"]) == FAILED
        err = capsys.readouterr().err
        assert f"stuck (process {process.pid} on {socket.gethostname()}) has not stopped within 0.3 s" in err
        assert "--force" in err
        assert main(["stop", "stuck", "--force"]) == OK
        assert "stuck is killed. To go on: millrace resume runs/stuck" in capsys.readouterr().out
        assert process.wait(10) == -signal.SIGKILL
        step = read_state(Path("runs/stuck")).step
        assert main(["resume", "stuck", "--set", f"steps={step + 3}", "--quiet"]) == OK
    finally:
        process.kill()
        process.communicate()


def test_what_ended_a_run_is_in_its_log(in_tmp: Path, capsys: Captured) -> None:
    settings = ["steps=40", "width=4", "compile=eager", "learning_rate=1e30"]
    arguments = [word for text in settings for word in ("--set", text)]
    assert main(["train", "digits", *arguments, "--quiet", "--device", "cpu"]) == FAILED
    capsys.readouterr()
    assert main(["runs"]) == OK
    assert capsys.readouterr().out.splitlines()[1].split()[1] == "failed"
    assert main(["logs", "latest"]) == OK
    assert "NonFiniteError: " in capsys.readouterr().out


def test_a_damaged_run_does_not_hide_the_others(in_tmp: Path, capsys: Captured) -> None:
    RunDirectory.create(Path("runs"), "good").close("finished", 3)
    RunDirectory.create(Path("runs"), "bad").close("finished", 3)
    Path("runs/bad/state.json").write_text("{}")
    assert main(["runs"]) == OK
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1].split()[:3] == ["good", "finished", "3"]
    assert "bad/state.json does not describe a run" in captured.err


def test_resume_takes_the_replicas_that_the_run_had(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"task": "digits", "arguments": ["--replicas", "2", "--update", "async"]}
    RunDirectory.create(Path("runs"), "run", config).close("interrupted", 3)
    taken: list[list[str]] = []
    monkeypatch.setattr("millrace.cli.train.main", taken.append)
    assert main(["resume", "run", "--set", "steps=9"]) == OK
    assert taken == [["--resume", "runs/run", "--replicas", "2", "--update", "async", "--set", "steps=9"]]


def test_names_that_are_none(in_tmp: Path, capsys: Captured) -> None:
    RunDirectory.create(Path("runs"), "digits-1").close("finished", 3)
    for command in ("logs", "stop", "resume"):
        assert main([command, "digist-1"]) == USAGE
        assert "Did you mean 'digits-1'" in capsys.readouterr().err


def test_no_runs_and_earlier_runs(in_tmp: Path, capsys: Captured) -> None:
    assert main(["runs"]) == OK
    assert "no run is under runs/" in capsys.readouterr().err
    for name in "abc":
        RunDirectory.create(Path("runs"), name).close("finished", 3)
    assert main(["runs", "--last", "2"]) == OK
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()] == ["run", "b", "c"]
    assert "and 1 earlier ones" in captured.err


def test_ages() -> None:
    assert [ago(s) for s in (-1, 3.2, 90, 5400, 200_000)] == ["0 s ago", "3 s ago", "2 min ago", "2 h ago", "2 d ago"]
