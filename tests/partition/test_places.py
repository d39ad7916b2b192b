"""What pictures say goes between devices is what the cut graph sends."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.graph.programs import Program, branch_graph, deep_graph, mlp_graph, programs
from tests.partition.cases import random_pieces, random_placement

from millrace.graph.graph import Graph
from millrace.graph.places import Places, crossings, short_names
from millrace.partition.cut import cut
from millrace.train.graph_views import node_views

DEVICES = ("/host:0/cpu:0", "/host:0/cpu:1", "/host:1/cpu:0")


def agree(graph: Graph, seed: int) -> None:
    pieces = random_pieces(graph, random_placement(graph, DEVICES, seed), seed)
    partition = cut(graph, pieces)
    places = Places({name: piece.device for piece in pieces for name in piece.nodes}, partition.homes)
    found = {(value.name, target) for value, target in crossings(graph, places)}
    assert found == {(edge.value, edge.target) for edge in partition.edges}
    views = {view.name: view for view in node_views(graph, places)}
    sends = [view for view in views.values() if view.op.startswith("Send")]
    assert {(view.inputs[0], view.device) for view in sends} == {(e.value, e.source) for e in partition.edges}
    assert len(sends) == len(partition.edges)
    for view in views.values():  # only a Recv has an input that is elsewhere, but for views that are made again
        if view.op.startswith("Recv"):
            (sent,) = view.inputs
            assert views[sent].device != view.device
        elif view.device and view.name in places.nodes:
            for name in view.inputs:
                assert views[name].device in (view.device, None), (view, name)


@settings(max_examples=25, deadline=None)
@given(program=programs, seed=st.integers(0, 1000))
def test_crossings_are_the_edges_of_the_partition(program: Program, seed: int) -> None:
    agree(program.graph(), seed)


@pytest.mark.parametrize("make", [mlp_graph, deep_graph, branch_graph])
def test_of_models_too(make: type) -> None:
    for seed in range(2):
        agree(make(), seed)


def test_short_names_are_short_where_that_says_which() -> None:
    assert short_names(DEVICES[:2]) == {"/host:0/cpu:0": "cpu:0", "/host:0/cpu:1": "cpu:1"}
    assert list(short_names(DEVICES).values()) == ["host:0/cpu:0", "host:0/cpu:1", "host:1/cpu:0"]
