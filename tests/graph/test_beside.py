"""Variables that a step does not use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.graph.step_models import MODELS, batch_of, step_graph

from millrace.graph.check import check
from millrace.graph.graph import TRAIN
from millrace.graph.passes.beside import beside_parameters
from millrace.graph.save import graph_bytes, graph_from_bytes
from millrace.graph.signature import BESIDE, Role
from millrace.runtime.session import Session


@pytest.mark.parametrize("model", ["cnn", "embedding"])
def test_the_step_is_the_same_and_leaves_them_alone(model: str, tmp_path: Path) -> None:
    graph, kind = step_graph(model, "adamw"), MODELS[model][1]
    wide = check(beside_parameters(graph))
    check(graph_from_bytes(graph_bytes(wide)))
    plain, session = (Session(g, copy=True, compile="eager", warn_new_shape=False) for g in (graph, wide))
    beside = [v for v in wide.variables if v.name.startswith(BESIDE)]
    assert [v.owner for v in beside] == [v.name for v in graph.variables if v.role is Role.PARAMETER]
    for variable in beside:
        session.assign(variable.name, torch.full(variable.spec.shape, 3.0))
    for step, size in enumerate((6, 6, 4)):  # traced again for the last
        batch = batch_of(kind, size, step)
        assert torch.equal(session.run([TRAIN, "loss"], batch)[1], plain.run([TRAIN, "loss"], batch)[1])
    assert all(bool((session.read(v.name) == 3.0).all()) for v in beside)
    assert all(torch.equal(session.read(v.name), plain.read(v.name)) for v in graph.variables)
    # A checkpoint of either is one for both.
    session.save(tmp_path / "wide")
    plain.restore(tmp_path / "wide")
    plain.save(tmp_path / "plain")
    session.restore(tmp_path / "plain")
    assert all(not session.read(v.name).any() for v in beside)
    session.restore(tmp_path / "wide")
    assert all(bool((session.read(v.name) == 3.0).all()) for v in beside)
