"""Memory that steps free: kept from step to step, given back when it is asked for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.small import run_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator, seen by Linux's own account")

PROGRAM = """
import resource
import torch
from millrace.compile.heap import give_back_freed_memory, keep_freed_memory

torch.set_num_threads(1)
keep_freed_memory()

def step():
    pieces = [torch.zeros(2**20) for _ in range(8)]  # 4 MiB each
    return sum(float(piece[0]) for piece in pieces)

def pages():
    return int(open("/proc/self/statm").read().split()[1])

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

step(), step()
before = faults()
for _ in range(10):
    step()
print((faults() - before) // 10)
held = pages()
give_back_freed_memory()
print(held - pages())
"""


def test_a_step_finds_the_memory_of_the_one_before(tmp_path: Path) -> None:
    done = run_program(PROGRAM, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    faults, returned = (int(line) for line in done.stdout.split())
    assert faults < 800  # of the 8,192 pages that a step uses
    assert returned > 7000  # all of it is free, and goes back when that is wanted
