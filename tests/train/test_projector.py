"""The projector's files, as TensorBoard itself reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
import torch
from google.protobuf import text_format
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from tensorboard.plugins.projector.projector_plugin import _read_tensor_tsv_file

from millrace.errors import RunDirectoryError
from millrace.train.callbacks import RunView
from millrace.train.projector import CONFIG, NAMES, VECTORS, ShowVectors, write_projector
from millrace.train.run_state import Outcome


def test_tensorboard_finds_vectors_and_labels(tmp_path: Path) -> None:
    vectors = torch.tensor([[1.5, -2], [0.25, 1e-7], [3, 4]])
    write_projector(tmp_path, "words", vectors.requires_grad_(), ["one", "t\two\n", " "])
    config = text_format.Parse((tmp_path / CONFIG).read_text(), ProjectorConfig())
    (table,) = config.embeddings
    assert table.tensor_name == "words"
    read = _read_tensor_tsv_file(str(tmp_path / table.tensor_path))
    assert torch.from_numpy(read).float().allclose(vectors, rtol=1e-4)
    assert table.metadata_path == NAMES
    assert (tmp_path / NAMES).read_text().splitlines() == ["one", "t wo", "·"]


@dataclass
class Run:
    directory: Path | None


def test_a_run_leaves_its_last_vectors_and_no_more_than_are_asked_for(tmp_path: Path) -> None:
    vectors = torch.zeros(3, 2)
    callback = ShowVectors("words", lambda: vectors, ["one", "two", "three"], most=2)
    vectors[0] = 1.5
    (tmp_path / "events").mkdir()
    callback.on_end(cast(RunView, Run(tmp_path)), cast(Outcome, None))
    assert (tmp_path / "events" / NAMES).read_text().splitlines() == ["one", "two"]
    assert _read_tensor_tsv_file(str(tmp_path / "events" / VECTORS)).tolist() == [[1.5, 1.5], [0, 0]]
    callback.on_end(cast(RunView, Run(None)), cast(Outcome, None))  # of a run that leaves nothing


def test_a_directory_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"vectors.tsv"):
        write_projector(tmp_path / "gone", "words", torch.ones(1, 2), ["one"])
