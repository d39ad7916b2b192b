"""Compiling beside training: whatever happens to the child process, the run goes on, and nothing is left behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from tests.compile.steps import BATCH, Said, fresh, run_steps, step_graph
from tests.small import child_environment

import millrace.compile.background as background
import millrace.compile.inductor as inductor
from millrace.compile.background import BackgroundCompilation
from millrace.compile.eager import Compiled, compile_eager
from millrace.compile.tiered import Runner
from millrace.compile.worker import UNKNOWN_OPERATOR
from millrace.errors import CompileError
from millrace.graph.save import save_graph
from millrace.runtime.session import Session

SOON_S = 60.0  # for what takes no time on an idle machine


def eventually(holds: Callable[[], object]) -> bool:
    end = time.monotonic() + SOON_S
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path / "cache"))


class Children(list[subprocess.Popen[bytes]]):
    """Shell commands in the place of the compiling process."""

    def __init__(self, command: str) -> None:
        self.command = command

    def start(self, graph_file: Path, threads: int, errors: IO[bytes]) -> subprocess.Popen[bytes]:
        # As the real one is started: what it leaves running has its standard error.
        child = subprocess.Popen(["sh", "-c", self.command], stderr=errors, start_new_session=True)
        self.append(child)
        return child


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Children]]:
    started: list[Children] = []

    def use(command: str) -> Children:
        children = Children(command)
        started.append(children)
        monkeypatch.setattr(background, "_start", children.start)
        return children

    yield use
    for child in (child for children in started for child in children):
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def test_a_child_that_is_killed_ends_the_compilation_at_once_with_all_it_started(
    tmp_path: Path, pretend: Callable[[str], Children]
) -> None:
    children = pretend(
        f"echo a warning >&2; sleep 1000 & echo $! > {tmp_path}/pid.new; mv {tmp_path}/pid*new {tmp_path}/pid; wait"
    )
    said, variables, twins = Said(), fresh(step_graph()), fresh(step_graph())
    runner = Runner(step_graph(), "tiered", said.append)
    run_steps(runner, variables, 2)
    assert eventually((tmp_path / "pid").exists)
    grandchild = int((tmp_path / "pid").read_text())
    assert is_running(grandchild)
    os.kill(children[0].pid, signal.SIGKILL)
    runner.wait(SOON_S)
    for variable, value in zip(variables, fresh(step_graph()), strict=True):
        variable.copy_(value)
    assert run_steps(runner, variables, 3) == run_steps(compile_eager(step_graph()), twins, 3)
    assert "was killed by signal 9 (SIGKILL)" in said.only
    assert runner.tier == "eager"
    assert eventually(lambda: not is_running(grandchild))


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("echo one >&2; echo 'the reason' >&2; exit 1", "staying eager: the reason"),
        ("exit 7", "staying eager: the compiling process ended with status 7"),
        ("kill -SEGV $$", "SIGSEGV"),
    ],
)
def test_a_child_that_fails_gives_its_reason(command: str, says: str, pretend: Callable[[str], Children]) -> None:
    pretend(command)
    said, variables = Said(), fresh(step_graph())
    runner = Runner(step_graph(), "tiered", said.append)
    runner.wait(SOON_S)
    run_steps(runner, variables, 2)
    assert says in said.only


def test_a_child_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, pretend: Callable[[str], Children]) -> None:
    children = pretend("sleep 1000")
    monkeypatch.setattr(background, "_TIME_LIMIT_S", 0.1)
    result = BackgroundCompilation(step_graph()).wait(SOON_S)
    assert isinstance(result, CompileError)
    assert "and was ended" in str(result)
    assert children[0].poll() == -signal.SIGKILL


def test_nobody_compiles_for_a_session_that_is_gone(pretend: Callable[[str], Children]) -> None:
    children = pretend("sleep 1000")
    session = Session(step_graph(), copy=True)
    for _ in range(2):
        session.run(["train", "loss"], BATCH)
    assert eventually(lambda: children)
    del session
    gc.collect()
    assert eventually(lambda: children[0].poll() is not None)


def test_one_child_at_a_time(tmp_path: Path, pretend: Callable[[str], Children]) -> None:
    children = pretend(f"cd {tmp_path}; test ! -e busy || touch two; touch busy; sleep 0.2; rm busy; exit 1")
    compilations = [BackgroundCompilation(step_graph()) for _ in range(3)]
    assert all(isinstance(c.wait(SOON_S), CompileError) for c in compilations)
    assert len(children) == 3
    assert not (tmp_path / "two").exists()


def test_what_a_child_cannot_do_is_compiled_here(
    monkeypatch: pytest.MonkeyPatch, pretend: Callable[[str], Children]
) -> None:
    """An operator that only this process has registered, or an artifact that cannot be saved."""
    pretend(f"exit {UNKNOWN_OPERATOR}")
    monkeypatch.setattr(background, "compile_inductor", lambda graph, _: compile_eager(graph))
    said, variables = Said(), fresh(step_graph())
    runner = Runner(step_graph(), "tiered", said.append)
    runner.wait(SOON_S)
    run_steps(runner, variables, 1)
    assert runner.tier == "inductor"
    assert "swapped in" in said.only


def test_the_child_s_files_are_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretend: Callable[[str], Children]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pretend("exit 1")
    BackgroundCompilation(step_graph()).wait(SOON_S)
    assert [p for p in tmp_path.iterdir() if p.name != "cache"] == []


# -- the real child --------------------------------------------------------------------------------------------------


def test_without_a_compiler_training_goes_on_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    said, variables, twins = Said(), fresh(step_graph()), fresh(step_graph())
    runner = Runner(step_graph(), "tiered", said.append)
    run_steps(runner, variables, 2)
    runner.wait()
    run_steps(runner, variables, 2)
    assert said.only == f"staying eager: {inductor.NO_COMPILER}"
    run_steps(compile_eager(step_graph()), twins, 2)
    run_steps(compile_eager(step_graph()), twins, 2)
    assert all(torch.equal(a, b) for a, b in zip(variables, twins, strict=True))


ENDS = """
import os, signal, sys, time
from millrace.compile import background
from millrace.compile.background import BackgroundCompilation
from millrace.graph import load_graph
compilation = BackgroundCompilation(load_graph(sys.argv[1]))
while not background._running:
    time.sleep(0.01)
print(next(iter(background._running)).pid, flush=True)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["returns", "killed"])
def test_no_child_outlives_a_run(how: str, tmp_path: Path) -> None:
    save_graph(step_graph(), tmp_path / "step.graph")
    done = subprocess.run(
        [sys.executable, "-c", ENDS, str(tmp_path / "step.graph"), how],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == (0 if how == "returns" else -signal.SIGKILL), done.stderr
    pid = int(done.stdout)
    assert eventually(lambda: not is_running(pid))


def test_the_child_s_work_is_what_the_parent_finds(in_cache: Compiled) -> None:
    """The fixture asserts that it worked; this, that its answer is right."""
    variables, twins = fresh(step_graph()), fresh(step_graph())
    losses: Any = run_steps(in_cache, variables, 3)
    assert losses == pytest.approx(run_steps(compile_eager(step_graph()), twins, 3), rel=1e-4)
