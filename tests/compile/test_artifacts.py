"""The cache: what decides an artifact's name, whose directory it may be, and that damage is never run."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.compile.steps import Said, fresh, run_steps, step_graph
from tests.small import cross_entropy, labelled, mlp

import millrace.compile.artifacts as artifacts
from millrace.compile.artifacts import artifact_path, cache_directory, read_artifact, write_artifact
from millrace.compile.tiered import Runner
from millrace.errors import CompileError
from millrace.graph.graph import Graph
from millrace.graph.training import training_graph


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "compiled"


def mlp_graph(dtype: torch.dtype = torch.float32, count: int = 6, lr: float = 0.1) -> Graph:
    model = mlp(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return training_graph(model, cross_entropy, optimizer, labelled(count, dtype))


@pytest.mark.usefixtures("cache")
def test_whatever_makes_other_code_makes_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [artifact_path(graph, 1).name for graph in (mlp_graph(), mlp_graph(torch.float64), mlp_graph(count=7))]
    graph = mlp_graph()
    assert artifact_path(graph, 1).name == names[0]
    changes: list[tuple[Any, str, Any]] = [
        (torch, "__version__", "2.99"),
        (torch, "are_deterministic_algorithms_enabled", lambda: True),
        (torch, "get_float32_matmul_precision", lambda: "medium"),
        (torch.backends.cpu, "get_cpu_capability", lambda: "NEON"),
        (artifacts, "__version__", "99"),
        (artifacts, "_processor_flags", lambda: "another processor"),
        (artifacts, "_lowering_digest", lambda: "another lowering"),
    ]
    for owner, name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            names.append(artifact_path(graph, 1).name)
    names.append(artifact_path(graph, 3).name)
    with torch._inductor.config.patch(fallback_random=True):
        names.append(artifact_path(graph, 1).name)
    assert len(set(names)) == len(names)
    assert artifact_path(graph, 1).name == names[0]


def test_the_cache_is_its_owner_s_alone(cache: Path) -> None:
    assert cache_directory() == cache
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_a_cache_that_others_may_write_is_not_used(cache: Path) -> None:
    cache_directory()
    cache.chmod(0o777)
    with pytest.raises(CompileError, match="can be written by other users"):
        cache_directory()
    said = Said()
    runner = Runner(step_graph(), "inductor", said.append)
    run_steps(runner, fresh(step_graph()), 1)
    assert said.only.startswith("staying eager: the cache of compiled graphs")


def test_where_no_cache_can_be_made_there_is_one_for_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path / "file"))
    directory = cache_directory()
    assert cache_directory() == directory
    write_artifact(b"code", directory / "a.bin")
    assert read_artifact(directory / "a.bin") == b"code"
    assert stat.S_IMODE(directory.parent.stat().st_mode) == 0o700
    assert len([r for r in caplog.records if "cannot be used" in r.message]) == 1


def test_a_relative_cache_does_not_follow_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MILLRACE_CACHE", "here")
    assert cache_directory() == tmp_path / "here" / "compiled"


@given(content=st.binary(max_size=200), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_every_flipped_bit_and_every_cut_is_a_miss(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, place: float, bit: int
) -> None:
    path = tmp_path_factory.mktemp("artifact") / "a.bin"
    write_artifact(content, path)
    assert read_artifact(path) == content
    whole = path.read_bytes()
    position = int(place * len(whole))
    path.write_bytes(whole[:position] + bytes([whole[position] ^ (1 << bit)]) + whole[position + 1 :])
    assert read_artifact(path) is None
    path.write_bytes(whole[:position])
    assert read_artifact(path) is None
    path.unlink()
    assert read_artifact(path) is None


@pytest.mark.parametrize("fault", ["replace", "write"])
def test_a_write_that_fails_leaves_the_artifact_before_and_no_litter(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.bin"
    write_artifact(b"before", path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        owner: Any = os if fault == "replace" else Path
        patch.setattr(owner, "replace" if fault == "replace" else "write_bytes", fail)
        with pytest.raises(OSError, match="No space"):
            write_artifact(b"after", path)
    assert read_artifact(path) == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_another_user_s_file_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    write_artifact(b"code", path)
    fstat: Callable[[int], os.stat_result] = os.fstat

    def another(descriptor: int) -> os.stat_result:
        fields = list(fstat(descriptor))
        fields[stat.ST_UID] += 1
        return os.stat_result(fields)

    monkeypatch.setattr(os, "fstat", another)
    assert read_artifact(path) is None
