"""Narrowing rewrites edges, and nothing else; and a device's files say it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from tests.partition.cases import random_pieces, random_placement
from torch import nn

from millrace.graph.graph import Graph
from millrace.graph.training import training_graph
from millrace.partition.cut import cut
from millrace.partition.files import load_program, save_program
from millrace.partition.narrow import narrow
from millrace.place.wire import Wire

DEVICES = ("/host:0/cpu:0", "/host:0/cpu:1", "/host:1/cpu:0")


def wide() -> Graph:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return training_graph(model, lambda m, x: m(x).square().mean(), sgd, torch.randn(128, 32))


def test_only_edges_change_and_only_those_that_are_wanted(tmp_path: Path) -> None:
    graph = wide()
    found = 0
    for seed in range(10):
        plain = cut(graph, random_pieces(graph, random_placement(graph, DEVICES, seed), seed))
        wire = Wire.of({"1": "zeros", "*": "bfloat16"})
        narrowed = narrow(plain, graph, wire)
        assert narrow(plain, graph, Wire.of(None)) == plain
        assert replace(narrowed, edges=plain.edges) == plain
        codecs = wire.codecs(graph)
        for before, after in zip(plain.edges, narrowed.edges, strict=True):
            assert after == replace(before, codec=codecs.get(before.value))
            found += after.codec is not None
        halved = sum(e.spec.size_bytes // 2 for e in narrowed.edges if e.codec == "bfloat16")
        assert narrowed.crossing_bytes() == plain.crossing_bytes() - halved
        program = narrowed.programs[DEVICES[0]]
        save_program(program, narrowed.edges, tmp_path / str(seed))
        assert load_program(tmp_path / str(seed))[1] == narrowed.edges
    assert found > 20
