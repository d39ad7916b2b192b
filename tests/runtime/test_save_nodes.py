"""Save and restore as graphs: checked like any graph, and true to every bit of every variable."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.small import copied, cross_entropy, differing, dropout_mlp, labelled, mlp
from torch import Tensor, nn

from millrace import Session, training_graph
from millrace.errors import CheckpointError, DamagedCheckpointError
from millrace.graph.check import check
from millrace.graph.graph import Graph
from millrace.graph.trace import trace
from millrace.runtime.commit import Digest
from millrace.runtime.save_nodes import restore_graph, save_graph_of
from millrace.runtime.shard import read_shard, verify


def graph_of(model: nn.Module) -> Graph:
    return training_graph(model, cross_entropy, torch.optim.AdamW(model.parameters(), lr=0.1), labelled())


def kinds_graph() -> tuple[Graph, dict[str, Tensor]]:
    """Variables of many dtypes and layouts, one of them empty, one a scalar."""
    torch.manual_seed(0)
    tensors = {
        "f32": torch.randn(2, 3),
        "bf16": torch.randn(3).bfloat16(),
        "f16": torch.randn(3).half(),
        "complex": torch.randn(2, dtype=torch.complex64),
        "int": torch.arange(3),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(3, 2).t(),
        "a name/with §": torch.ones(1),
    }
    graph = trace(lambda v, x: x + v["scalar"].float(), tensors, torch.zeros(2))
    return graph, tensors


def test_they_are_graphs_like_any_other() -> None:
    graph = graph_of(dropout_mlp())
    names = [v.name for v in graph.variables]
    save, restore = save_graph_of(graph).graph, restore_graph(graph).graph
    for side in (save, restore):
        assert check(side) is side
        assert [v.name for v in side.variables] == names
        assert [f.name for f in side.feeds] == ["path"]
        assert side.nodes
        assert "path" in str(side)
    assert (list(save.fetches), list(save.updates)) == (["digest"], [])
    assert (list(restore.fetches), list(restore.updates)) == ([], names)


def test_every_dtype_and_layout_comes_back_bit_for_bit_into_its_own_memory(tmp_path: Path) -> None:
    graph, tensors = kinds_graph()
    path = tmp_path / "all.safetensors"
    digest = save_graph_of(graph).write(path, tensors)
    verify(path, digest)
    assert differing(read_shard(path, digest), tensors) == []
    targets = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    places = {name: (t.data_ptr(), t.stride()) for name, t in targets.items()}
    restore_graph(graph).run(targets, path)
    assert differing(targets, tensors) == []
    assert {name: (t.data_ptr(), t.stride()) for name, t in targets.items()} == places


def test_the_digest_is_of_the_file(tmp_path: Path) -> None:
    graph, tensors = kinds_graph()
    digest = save_graph_of(graph).write(tmp_path / "a", tensors)
    assert isinstance(digest, Digest)
    assert digest.size_bytes == (tmp_path / "a").stat().st_size
    again = save_graph_of(graph).write(tmp_path / "b", tensors)
    assert again == digest
    changed = {**tensors, "scalar": tensors["scalar"] + 1}
    assert save_graph_of(graph).write(tmp_path / "c", changed) != digest


def test_a_graph_without_variables(tmp_path: Path) -> None:
    session = Session(trace(lambda v, x: x.sum(), {}, torch.ones(2)), compile="eager")
    session.save(tmp_path / "none.safetensors")
    session.restore(tmp_path / "none.safetensors")
    assert load_file(tmp_path / "none.safetensors") == {}


@pytest.mark.parametrize("name", ["with space", "ünïcödé ✓", "new\nline", "x" * 200])
def test_any_path(name: str, tmp_path: Path) -> None:
    graph, tensors = kinds_graph()
    save_graph_of(graph).run(tensors, tmp_path / name)
    restore_graph(graph).run(copied(tensors), tmp_path / name)


def test_a_path_that_is_too_long_says_so() -> None:
    graph, tensors = kinds_graph()
    with pytest.raises(CheckpointError, match="longer than 4096 bytes"):
        save_graph_of(graph).run(tensors, Path("/tmp/" + "d/" * 2500))


def test_a_path_as_text_is_a_path(tmp_path: Path) -> None:
    session = Session(graph_of(mlp()), compile="eager")
    target: Any = os.fspath(tmp_path / "sub" / "state.safetensors")
    session.save(target)
    session.restore(target)


def test_a_damaged_file_changes_nothing_and_is_named(tmp_path: Path) -> None:
    session = Session(graph_of(mlp()), compile="eager")
    path = tmp_path / "state.safetensors"
    session.save(path)
    before = copied(session.variables)
    whole = path.read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DamagedCheckpointError, match=r"state\.safetensors"):
            session.restore(path)
    path.unlink()
    with pytest.raises(DamagedCheckpointError, match="cannot be read"):
        session.restore(path)
    assert differing(before, session.variables) == []


def test_a_save_that_fails_leaves_the_file_before_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(graph_of(mlp()), compile="eager")
    path = tmp_path / "state.safetensors"
    session.save(path)
    saved = copied(session.variables)
    session.run("train", labelled())

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"No space left.* bytes are free.*What was saved before is whole"):
            session.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
    session.restore(path)
    assert differing(saved, session.variables) == []
