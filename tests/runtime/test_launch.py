"""Processes that are started end for certain, and it is known how."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from millrace.runtime.launch import ProcessLauncher

PROGRAM = """
import os, subprocess, sys, time

def main(name, parent, what):
    assert int(parent) == os.getppid()
    print(name, os.environ["OMP_NUM_THREADS"], os.environ["SECRET"], file=sys.stderr, flush=True)
    if what == "fail":
        sys.exit("it was not to be")
    if what == "family":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(child.pid, file=sys.stderr, flush=True)
    if what == "orphan":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(child.pid, file=sys.stderr, flush=True)
        sys.exit(3)
    time.sleep(600)

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ProcessLauncher]]:
    (tmp_path / "launched.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(str(tmp_path))
    with contextlib.ExitStack() as stack:

        def make(what: str) -> ProcessLauncher:
            return stack.enter_context(contextlib.closing(ProcessLauncher("launched", [what], 3, tmp_path)))

        yield make


def until(true: Callable[[], object], within_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_has_its_name_threads_and_secrets_and_says_how_it_ended(
    launcher: Callable[[str], ProcessLauncher],
) -> None:
    processes = launcher("sleep")
    for name in ("a", "b"):
        processes.start(name, {"SECRET": "hush"})
    until(lambda: processes.last_words("b") == "b 3 hush")
    command = Path(f"/proc/{processes.pids['b']}/cmdline").read_bytes()
    assert b"hush" not in command
    assert processes.exit_of("a") is None
    began_s = time.monotonic()
    processes.kill("a")
    processes.kill("a")
    assert time.monotonic() - began_s < 0.1
    until(lambda: processes.exit_of("a") is not None)
    assert processes.exit_of("a") == "was killed by SIGKILL"
    processes.kill("a")
    assert processes.exit_of("b") is None
    os.kill(processes.pids["b"], signal.SIGTERM)
    until(lambda: processes.exit_of("b") is not None)
    assert processes.exit_of("b") == "was killed by SIGTERM"


def test_a_failure_is_told_with_its_last_words(launcher: Callable[[str], ProcessLauncher]) -> None:
    processes = launcher("fail")
    processes.start("a", {"SECRET": ""})
    until(lambda: processes.exit_of("a") is not None)
    assert processes.exit_of("a") == "exited with 1"
    assert processes.last_words("a") == "it was not to be"


@pytest.mark.parametrize("what", ["family", "orphan"])
def test_its_own_children_end_with_it(what: str, launcher: Callable[[str], ProcessLauncher]) -> None:
    processes = launcher(what)
    processes.start("a", {"SECRET": ""})
    until(lambda: processes.last_words("a").isdecimal())
    grandchild = int(processes.last_words("a"))
    if what == "family":
        assert alive(grandchild)
        processes.kill("a")
    until(lambda: processes.exit_of("a") is not None)
    until(lambda: not alive(grandchild))


def test_closing_leaves_nothing_not_even_what_was_stopped(launcher: Callable[[str], ProcessLauncher]) -> None:
    processes = launcher("sleep")
    for name in ("a", "b"):
        processes.start(name, {"SECRET": ""})
    os.kill(processes.pids["a"], signal.SIGSTOP)
    processes.close()
    processes.close()
    for pid in processes.pids.values():
        assert not Path(f"/proc/{pid}").exists()
    assert processes.exit_of("a") == "was killed by SIGKILL"
    with pytest.raises(KeyError):
        processes.exit_of("nobody")
    assert subprocess.run([sys.executable, "-c", ""], check=True).returncode == 0  # other children are not waited for
