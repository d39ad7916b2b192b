"""Machine code is made once for all processes of a user."""

from __future__ import annotations

import errno
import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.small import child_environment

import millrace.place.compiled as module

pytest.importorskip("numba")

PROGRAM = """
import json, sys
from millrace.place.compiled import compiled

@compiled
def total(count: int) -> int:
    found = 0
    for number in range(count):
        found += number % 7
    return found

sys.stdin.readline()  # all begin together
found = total(1000)
ready = total.ready()
print(json.dumps({"found": found, "compiled": sum(ready.stats.cache_misses.values())}))
"""


def test_processes_that_begin_together_compile_once(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {**child_environment(), "MILLRACE_CACHE": str(tmp_path / "cache")}
    children = [
        subprocess.Popen(
            [sys.executable, program], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    try:
        for child in children:
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
        said = [json.loads(child.communicate(timeout=100)[0]) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    assert [each["found"] for each in said] == [sum(number % 7 for number in range(1000))] * 3
    assert sorted(each["compiled"] for each in said) == [0, 0, 1]


def doubled(number: int) -> int:
    return 2 * number


@pytest.mark.parametrize(
    ("error", "longest_s"),
    [(errno.ENOLCK, 1e6), (errno.EWOULDBLOCK, 0.2)],
    ids=["no locks here", "another compiles for long"],
)
def test_who_gets_no_lock_compiles_beside_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, longest_s: float
) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(error, "refused")

    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path))
    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(module, "_LONGEST_S", longest_s)
    assert module.compiled(doubled)(21) == 42
