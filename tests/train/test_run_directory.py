"""Run directories under contention, kills, resumes and full disks."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from millrace.errors import RunDirectoryError, SettingError
from millrace.train.run_directory import RunDirectory
from millrace.train.run_files import write_atomically
from millrace.train.stop_request import StopRequest

# Takes the directory, says so, then measures as fast as it can. argv: root, name. With a third word: forks a child
# that outlives it, as a data loader's worker may.
HOLDER = """
import os, sys, time
from pathlib import Path
from millrace.train.run_directory import RunDirectory
run = RunDirectory.create(Path(sys.argv[1]), sys.argv[2], {"task": "digits"})
if len(sys.argv) == 3:
    print(0, flush=True)
elif os.fork() == 0:
    print(os.getpid(), flush=True)
    time.sleep(60)
    os._exit(0)
step = 0
while True:
    step += 1
    run.log(step, {"loss": 1 / step})
"""


@contextmanager
def holder(root: Path, name: str, *extra: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A real process that holds a run; with the number of its forked child, if any."""
    command = [sys.executable, "-c", HOLDER, str(root), name, *extra]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    child = 0
    try:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        yield process, child
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        if child:
            os.kill(child, signal.SIGKILL)


def test_a_second_process_is_refused_until_the_holder_is_killed(tmp_path: Path) -> None:
    with holder(tmp_path, "a") as (process, _):
        for exist in ("new", "resume"):
            with pytest.raises(RunDirectoryError, match=rf"in use by a run in process {process.pid}\b.*choose another"):
                RunDirectory.create(tmp_path, "a", exist=exist)
        assert RunDirectory.open(tmp_path / "a").state.status == "running"  # a reader is always let in
        time.sleep(0.1)
        process.kill()
        process.wait()
        reader = RunDirectory.open(tmp_path / "a")
        assert reader.state.status == "killed"
        steps = [record["step"] for record in reader.read_metrics()]
        assert len(steps) > 10
        assert steps == list(range(1, len(steps) + 1))
        with RunDirectory.create(tmp_path, "a", exist="resume") as run:
            assert run.rewind(4) == len(steps) - 4
            run.log(5, {"loss": 0.0})
            assert [record["step"] for record in run.read_metrics()] == [1, 2, 3, 4, 5]
            assert run.state.status == "running"
            assert run.state.pid == os.getpid()


def test_a_forked_worker_does_not_keep_a_dead_runs_directory_busy(tmp_path: Path) -> None:
    with holder(tmp_path, "a", "fork") as (process, child):
        process.kill()
        process.wait()
        RunDirectory.create(tmp_path, "a", exist="resume").close("finished")
        os.kill(child, 0)  # it still lives


def test_of_many_processes_that_start_at_once_one_gets_the_directory(tmp_path: Path) -> None:
    def attempt(number: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 2
        try:
            while not (tmp_path / "go").exists():
                time.sleep(0.001)
            RunDirectory.create(tmp_path, "a", {"number": number})
            code = 0
            time.sleep(0.2)
        except RunDirectoryError:
            code = 1
        finally:
            os._exit(code)

    pids = [attempt(number) for number in range(6)]
    (tmp_path / "go").touch()
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert sorted(codes) == [0, 1, 1, 1, 1, 1]
    assert RunDirectory.open(tmp_path / "a").config == {"number": codes.index(0)}


def test_asking_how_a_run_is_never_keeps_a_run_from_starting(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path, "a").close("failed")
    state = json.loads((tmp_path / "a" / "state.json").read_text())
    (tmp_path / "a" / "state.json").write_text(json.dumps({**state, "status": "running", "pid": os.getpid()}))
    assert RunDirectory.open(tmp_path / "a").state.status == "killed"  # whatever now has its process number
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            assert RunDirectory.open(tmp_path / "a").state.status in ("running", "killed", "finished")

    readers = [threading.Thread(target=ask) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(10):
            with RunDirectory.create(tmp_path, "a", exist="resume") as run:
                assert run.state.status == "running"
    finally:
        done.set()
        for reader in readers:
            reader.join()


def test_two_runs_in_one_process_are_refused_too(tmp_path: Path) -> None:
    with (
        RunDirectory.create(tmp_path, "a"),
        pytest.raises(RunDirectoryError, match=rf"process {os.getpid()} \(this one"),
    ):
        RunDirectory.create(tmp_path, "a", exist="resume")


def test_a_directory_with_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "config.json").write_text("mine")
    with pytest.raises(RunDirectoryError, match=r"not a run and not empty: it holds 'config.json'"):
        RunDirectory.create(tmp_path, "thesis", {})
    assert [entry.name for entry in (tmp_path / "thesis").iterdir()] == ["config.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="Cannot make the run directory"):
        RunDirectory.create(tmp_path, "file")


def test_a_used_directory_is_refused_to_a_new_run_and_resumed_on_request(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path, "a", {"task": "digits", "steps": 3}) as run:
        run.log(3, {"loss": 0.5})
        run.mark(3)
    first = run.state
    assert (first.status, first.step) == ("finished", 3)
    with pytest.raises(RunDirectoryError, match=r"already holds a run \(finished at step 3\). Resume it with --resume"):
        RunDirectory.create(tmp_path, "a", {"task": "other"})
    assert run.config == {"task": "digits", "steps": 3}

    with RunDirectory.create(tmp_path, "a", exist="resume") as again:
        assert again.config == {"task": "digits", "steps": 3}
        assert again.state.created_at == first.created_at
        assert again.state.started_at > first.started_at
        assert len(again.read_metrics()) == 1
    RunDirectory.create(tmp_path, "a", {"task": "digits", "steps": 9}, exist="resume").close("finished", 9)
    assert run.config["steps"] == 9
    assert json.loads((run.path / "config.1.json").read_text())["steps"] == 3


def test_a_directory_whose_creation_was_killed_is_taken(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "a", {"number": 1})
    run.close("failed")
    (run.path / "state.json").unlink()  # written last
    (run.path / "state.json.tmp-123-00aa").write_text("{")
    RunDirectory.create(tmp_path, "a", {"number": 2}).close("finished")
    assert run.config == {"number": 2}
    assert not list(run.path.glob("*.tmp-*"))


@pytest.mark.parametrize(
    ("raised", "status"), [(None, "finished"), (KeyboardInterrupt(), "interrupted"), (ValueError("x"), "failed")]
)
def test_the_state_says_how_a_run_ended(tmp_path: Path, raised: BaseException | None, status: str) -> None:
    def body() -> None:
        with RunDirectory.create(tmp_path, "a") as run:
            run.mark(7)
            if raised is not None:
                raise raised

    if raised is None:
        body()
    else:
        with pytest.raises(type(raised)):
            body()
    state = RunDirectory.open(tmp_path / "a").state
    assert (state.status, state.step, state.pid) == (status, 7, os.getpid())


def test_default_names_are_unique_and_the_latest_is_the_last_started_or_resumed(tmp_path: Path) -> None:
    runs = [RunDirectory.create(tmp_path, config={"task": "a b/c"}) for _ in range(5)]
    names = [run.name for run in runs]
    assert len(set(names)) == 5
    for run in runs:
        assert re.fullmatch(r"a_b_c-\d{8}-\d{6}-[0-9a-f]{4}", run.name)
        run.close("finished")
    assert RunDirectory.latest(tmp_path).name == names[-1]
    RunDirectory.create(tmp_path, names[2], exist="resume").close("finished")
    assert RunDirectory.latest(tmp_path).name == names[2]
    RunDirectory.create(tmp_path, exist="resume").close("interrupted")
    assert RunDirectory.open(tmp_path / names[2]).state.status == "interrupted"


def test_runs_are_found_by_path_name_and_latest(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="No run is under"):
        RunDirectory.latest(tmp_path / "runs")
    RunDirectory.create(tmp_path / "runs", "digits-1").close("finished")
    for word in (str(tmp_path / "runs" / "digits-1"), "digits-1", "latest"):
        assert RunDirectory.find(word, tmp_path / "runs").name == "digits-1"
    with pytest.raises(RunDirectoryError, match="Did you mean 'digits-1'"):
        RunDirectory.find("digit-1", tmp_path / "runs")
    with pytest.raises(RunDirectoryError, match="got nothing"):
        RunDirectory.open(tmp_path / "nowhere")
    with pytest.raises(RunDirectoryError, match="got a directory without one"):
        RunDirectory.create(tmp_path, "runs", exist="resume")


def test_a_reader_cannot_write(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path, "a").close("finished")
    reader = RunDirectory.open(tmp_path / "a")
    actions: list[Callable[[], object]] = [
        lambda: reader.log(1, {}),
        lambda: reader.rewind(0),
        lambda: reader.mark(1),
    ]
    for action in actions:
        with pytest.raises(RunDirectoryError, match="open for reading"):
            action()
    before = reader.state
    reader.close("failed")
    assert reader.state == before


def test_settings_that_are_not_json_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="'where' cannot be kept as JSON"):
        RunDirectory.create(tmp_path, "a", {"task": "x", "where": tmp_path})  # type: ignore[dict-item]
    assert not list(tmp_path.iterdir())


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path, "a").close("finished")
    for content, message in (("{", "Cannot read .*state.json"), ('{"a": 1}', "does not describe a run")):
        (tmp_path / "a" / "state.json").write_text(content)
        with pytest.raises(RunDirectoryError, match=message):
            _ = RunDirectory.open(tmp_path / "a").state


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """Writes beyond this size fail part-way, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_stop_file_out_of_reach_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_reach(*_: object, **__: object) -> bool:
        raise OSError(errno.ESTALE, "Stale file handle")

    run = RunDirectory.create(tmp_path, "run")
    with monkeypatch.context() as broken:
        broken.setattr(Path, "exists", out_of_reach)
        assert not StopRequest(run.path)()
    with monkeypatch.context() as broken:
        broken.setattr("millrace.train.run_directory.withdraw_stop", out_of_reach)
        run.close("finished", 3)
    assert (run.state.status, run.state.step) == ("finished", 3)


def test_a_write_that_fails_half_way_leaves_the_files_whole(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path, "a", {"steps": 1}) as run:
        for step in range(1, 4):
            run.log(step, {"loss": 0.5})
        size_bytes = (run.path / "metrics.jsonl").stat().st_size
        with file_size_limit(size_bytes + 10), pytest.raises(RunDirectoryError, match="lines so far are whole"):
            run.log(4, {"loss": 0.25})
        assert [record["step"] for record in run.read_metrics()] == [1, 2, 3]
        run.log(4, {"loss": 0.25})  # space has been freed
        assert [record["step"] for record in run.read_metrics()] == [1, 2, 3, 4]

        write_atomically(run.path / "config.json", b'"old"')
        with file_size_limit(1000), pytest.raises(RunDirectoryError, match="earlier content"):
            write_atomically(run.path / "config.json", b"x" * 2000)
        assert run.config == "old"
        assert not list(run.path.glob("*.tmp-*"))
