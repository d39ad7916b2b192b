"""The compiled step that tests of this room share: compiled once in a child process, then out of the cache."""

from __future__ import annotations

import fcntl

import pytest
from tests.compile.steps import nothing_compiles, step_graph

import millrace.compile.inductor as inductor
from millrace.compile.background import BackgroundCompilation
from millrace.compile.eager import Compiled
from millrace.compile.inductor_private import has_cpp_compiler
from millrace.errors import CompileError
from millrace.files import user_cache


@pytest.fixture(scope="session")
def in_cache() -> Compiled:
    """`step_graph` compiled by a child process, whose artifact is in the cache of this test run from here on."""
    if not has_cpp_compiler():
        pytest.skip("needs a C++ compiler")
    user_cache().mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, (user_cache() / "in_cache.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest's other processes find it, instead of compiling beside this one
        patch.setattr(inductor, "compile_module", nothing_compiles)  # here; the child has its own
        result = BackgroundCompilation(step_graph()).wait()
    assert result is not None
    assert not isinstance(result, CompileError), result
    return result
