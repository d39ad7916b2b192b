"""The compiled tier: the eager step, out of the cache in any process, and compiled anew where that is damaged."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from tests.compile.steps import BATCH, Said, close, fresh, nothing_compiles, run_steps, step_graph
from tests.small import run_program
from torch import Tensor

import millrace.compile.inductor as inductor
from millrace.compile.artifacts import artifact_path, read_artifact
from millrace.compile.eager import Compiled, compile_eager
from millrace.compile.inductor import compile_inductor, is_cached, load_cached
from millrace.compile.tiered import Runner
from millrace.errors import CompileError

SECOND_PROCESS = """
import sys
import torch
torch.set_num_threads(1)
import millrace.compile.inductor as inductor
from tests.compile.steps import Said, fresh, nothing_compiles, run_steps, step_graph
from millrace.compile.tiered import Runner
inductor.compile_module = nothing_compiles
said = Said()
runner = Runner(step_graph(seed=5), sys.argv[1], said.append)
variables = fresh(step_graph(seed=5))
run_steps(runner, variables, 2)
runner.wait()
run_steps(runner, variables, 2)
print(runner.tier, said.only)
"""


def test_both_tiers_take_the_same_steps_and_draw_the_same_numbers(in_cache: Compiled) -> None:
    graph = step_graph()
    variables, twins = fresh(graph), fresh(graph)
    addresses = [v.data_ptr() for v in variables]
    losses, expected = run_steps(in_cache, variables, 5), run_steps(compile_eager(graph), twins, 5)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert close(variables, twins)
    assert [v.data_ptr() for v in variables] == addresses
    whole = [i for i, v in enumerate(variables) if not v.is_floating_point()]
    assert whole
    assert all(torch.equal(variables[i], twins[i]) for i in whole)


def test_fetches_outlast_later_steps(in_cache: Compiled) -> None:
    variables = fresh(step_graph())
    first = in_cache(variables, list(BATCH))
    kept = [value.clone() for value in first]
    run_steps(in_cache, variables, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


@pytest.mark.parametrize("tier", ["inductor", pytest.param("tiered", marks=pytest.mark.long)])
@pytest.mark.usefixtures("in_cache")
def test_a_second_process_compiles_nothing(tier: str, tmp_path: Path) -> None:
    """Its module has other initial values, its compiler would raise, and no kernel is built while loading."""
    root = Path(__file__).parents[2]
    program = f"import sys; sys.path.insert(0, {str(root)!r})\n{SECOND_PROCESS}"
    kernels = tmp_path / "kernels"
    shutil.copytree(os.environ["TORCHINDUCTOR_CACHE_DIR"], kernels)
    before = sorted(kernels.rglob("*.so"))
    assert before
    done = run_program(program, tier, cwd=tmp_path, TORCHINDUCTOR_CACHE_DIR=str(kernels))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("inductor compiled"), done.stdout
    assert sorted(kernels.rglob("*.so")) == before


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_cache: Compiled) -> Path:
    """A copy of the cache with the artifact in it, to do damage to; the kernels are shared. Returns the artifact."""
    shared = artifact_path(step_graph(), 1)
    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path / "cache"))
    path = artifact_path(step_graph(), 1)
    assert path.name == shared.name
    shutil.copy(shared, path)
    return path


def test_an_artifact_in_the_cache_is_what_runs(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "compile_module", nothing_compiles)
    assert is_cached(step_graph(), 1)
    run_steps(compile_inductor(step_graph()), fresh(step_graph()), 1)
    own_cache.unlink()
    assert not is_cached(step_graph(), 1)
    assert load_cached(step_graph(), 1) is None
    with pytest.raises(CompileError, match="something was compiled"):
        compile_inductor(step_graph())


class Stub:
    """In the place of what the compiler makes; `run` does its work."""

    def __init__(self, run: Compiled) -> None:
        self._run = run

    def to_bytes(self) -> bytes:
        return b"code"

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        count = len(step_graph().variables)
        return self._run(inputs[:count], inputs[count : count + 2])


def test_a_damaged_artifact_is_compiled_anew_and_mended(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, in_cache: Compiled
) -> None:
    whole = own_cache.read_bytes()
    own_cache.write_bytes(whole[: len(whole) // 2])
    assert load_cached(step_graph(), 1) is None
    monkeypatch.setattr(inductor, "compile_module", lambda *_: Stub(in_cache))
    run_steps(compile_inductor(step_graph()), fresh(step_graph()), 1)
    assert read_artifact(own_cache) == b"code"
    assert [p for p in own_cache.parent.iterdir() if p.is_file()] == [own_cache]  # nothing half-written lies about


def test_an_artifact_that_torch_cannot_read_is_a_miss(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checksum is right, but another torch wrote it."""
    inductor.write_artifact(b"CacheCompiledArtifact of another version", own_cache)
    assert is_cached(step_graph(), 1)
    assert load_cached(step_graph(), 1) is None


def test_a_compiler_that_fails_is_one_line_and_no_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("C++ compile error\n\nCommand:\ng++ and forty more lines")

    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path))
    monkeypatch.setattr(inductor, "compile_module", fail)
    said, variables, twins = Said(), fresh(step_graph()), fresh(step_graph())
    runner = Runner(step_graph(), "inductor", said.append)
    assert said.only == "staying eager: Inductor failed: RuntimeError: C++ compile error"
    assert run_steps(runner, variables, 2) == run_steps(compile_eager(step_graph()), twins, 2)


def test_a_cache_that_cannot_be_written_costs_only_the_cache(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, in_cache: Compiled
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    own_cache.unlink()
    monkeypatch.setattr(inductor, "write_artifact", full)
    monkeypatch.setattr(inductor, "compile_module", lambda *_: Stub(in_cache))
    run_steps(compile_inductor(step_graph()), fresh(step_graph()), 1)
    assert not own_cache.exists()
