"""The projector's files, as TensorBoard itself reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from google.protobuf import text_format
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from tensorboard.plugins.projector.projector_plugin import _read_tensor_tsv_file

from millrace.errors import RunDirectoryError
from millrace.train.projector import CONFIG, NAMES, write_projector


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


def test_a_directory_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"vectors.tsv"):
        write_projector(tmp_path / "gone", "words", torch.ones(1, 2), ["one"])
