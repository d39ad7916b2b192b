"""Children made by a fork are like those that are started: with settings, files and an end of their own."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import pytest

from millrace import fork_server
from millrace.fork_server import ForkedChild, fork_module

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere children are started plainly")

CHILD = """
import os, random, sys
import torch

if __name__ == "__main__":
    from millrace.child_process import end_with
    end_with(int(sys.argv[1]))
    print(*sys.argv[2:], os.getcwd(), os.environ.get("MARK"), torch.get_num_threads(), random.random(), file=sys.stderr)
    if len(sys.argv) > 3:
        os.write(int(sys.argv[3]), b"here")
    sys.stderr.flush()
    if sys.argv[2] == "stay":
        import time
        time.sleep(600)
    sys.exit(7)
"""
THREADS = {"OMP_NUM_THREADS": "3"}


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "forked.py").write_text(CHILD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)


def run(
    *words: str, errors: IO[bytes], environment: dict[str, str] = THREADS, descriptors: tuple[int, ...] = ()
) -> ForkedChild:
    child = fork_module(
        "forked", [str(os.getpid()), *words], errors=errors, environment=environment, descriptors=descriptors
    )
    assert isinstance(child, ForkedChild)
    return child


def said(*words: str, environment: dict[str, str] = THREADS) -> list[str]:
    with tempfile.TemporaryFile() as errors:
        status = run(*words, errors=errors, environment=environment).wait(60.0)
        errors.seek(0)
        said = errors.read().decode()
        assert status == 7, said
        return said.split()


def server_pid() -> int:
    assert fork_server._server is not None
    return fork_server._server.process.pid


def test_a_child_has_its_arguments_directory_environment_threads_and_chance(tmp_path: Path) -> None:
    first = said("go", environment={**THREADS, "MARK": "one"})
    second = said("went", environment={"OMP_NUM_THREADS": "2"})
    assert first[:4] == ["go", str(tmp_path), "one", "3"]
    assert second[:4] == ["went", str(tmp_path), "None", "2"]
    assert first[4] != second[4]


def test_a_child_inherits_open_files_under_their_numbers() -> None:
    read, write = os.pipe()
    with tempfile.TemporaryFile() as errors:
        child = run("go", str(write), errors=errors, descriptors=(write,))
        os.close(write)
        assert os.read(read, 10) == b"here"
        assert os.read(read, 10) == b""  # nobody else holds it open, the server neither
        child.wait(60.0)
    os.close(read)


def test_waiting_is_bounded_and_tells_which_signal_ended_it() -> None:
    with tempfile.TemporaryFile() as errors:
        child = run("stay", errors=errors)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.05)
    assert Path(f"/proc/{child.pid}/comm").read_text() == "forked\n"
    os.killpg(child.pid, signal.SIGKILL)  # it leads a group
    assert child.wait(10.0) == child.returncode == -signal.SIGKILL


def test_a_child_can_be_killed_as_soon_as_it_is_known() -> None:
    with tempfile.TemporaryFile() as errors:
        run("go", errors=errors).wait(60.0)
        server = server_pid()
        for _ in range(30):
            child = run("stay", errors=errors)
            os.killpg(child.pid, signal.SIGKILL)
            assert child.wait(10.0) == -signal.SIGKILL
        assert server_pid() == server


def test_an_interrupted_start_is_not_taken_for_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    said("go")

    def interrupted(connection: object, count: int) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, tempfile.TemporaryFile() as errors:
        patch.setattr(fork_server, "_receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("stay", errors=errors)
    assert said("next")[0] == "next"


def test_a_child_is_waited_for_in_a_process_with_many_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip("more files cannot be opened here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert said("go")[0] == "go"
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_where_no_server_can_fork_a_child_is_started_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise OSError

    monkeypatch.setattr(fork_server, "_ask", refused)
    with tempfile.TemporaryFile() as errors:
        child = fork_module("forked", [str(os.getpid()), "go"], errors=errors, environment=THREADS)
        assert not isinstance(child, ForkedChild)
        assert child.wait(60.0) == 7


def test_a_prepared_server_has_imported_what_its_forks_need() -> None:
    fork_server._end_server()
    fork_server.prepare("forked")
    until_s = time.monotonic() + 60.0
    while fork_server._server is None or "forked" not in fork_server._server._imported:
        assert time.monotonic() < until_s
        time.sleep(0.05)
    prepared = server_pid()
    assert said("go")[0] == "go"
    assert server_pid() == prepared


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_server_is_replaced_and_its_children_live(how: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server, "_FORK_TIMEOUT_S", 5.0)
    fork_server._end_server()
    with tempfile.TemporaryFile() as errors:
        before = run("stay", errors=errors)
        lost = server_pid()
        time.sleep(0.2)
        os.kill(lost, how)
        time.sleep(0.2)
        after = run("stay", errors=errors)
        assert server_pid() != lost
        for child in (before, after):
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(0.05)
            os.killpg(child.pid, signal.SIGKILL)
            child.wait(10.0)


def test_another_setting_of_a_library_asks_for_another_server(monkeypatch: pytest.MonkeyPatch) -> None:
    said("go")
    before = server_pid()
    monkeypatch.setenv("UNRELATED", "1")
    said("go")
    assert server_pid() == before
    monkeypatch.setenv("TORCH_SHOW_CPP_STACKTRACES", "0")
    said("go")
    assert server_pid() != before


def test_what_cannot_be_imported_is_told_in_the_childs_own_file(tmp_path: Path) -> None:
    (tmp_path / "forked.py").write_text("raise RuntimeError('broken')\n")
    with tempfile.TemporaryFile() as errors:
        child = fork_module("forked", [], errors=errors, environment={})
        assert child.wait(60.0) == 1
        errors.seek(0)
        assert b"RuntimeError: broken" in errors.read()


def test_when_this_process_is_killed_its_children_and_the_server_end(tmp_path: Path) -> None:
    (tmp_path / "asks.py").write_text(
        "import os, subprocess, sys, time\n"
        "from millrace import fork_server\n"
        "arguments = [str(os.getpid()), 'stay']\n"
        "child = fork_server.fork_module('forked', arguments, errors=sys.stderr.buffer, environment={})\n"
        "print(child.pid, fork_server._server.process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    asks = subprocess.Popen([sys.executable, "asks.py"], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path})
    assert asks.stdout is not None
    pids = [int(word) for word in asks.stdout.readline().split()]
    assert len(pids) == 2
    asks.kill()
    asks.wait()
    asks.stdout.close()
    deadline_s = time.monotonic() + 10.0
    while any(Path(f"/proc/{pid}").exists() and "Z" not in status(pid) for pid in pids):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"
