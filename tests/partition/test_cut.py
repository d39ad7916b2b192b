"""A cut graph computes what the whole one does, bit for bit, wherever its nodes are and whatever their order."""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.graph.programs import Program, branch_graph, deep_graph, equal_bits, feeds_of, mlp_graph, programs
from tests.partition.cases import random_partition, run_partition, whole
from torch import Tensor, nn

import millrace
from millrace.compile.in_place import in_place
from millrace.errors import GraphError
from millrace.graph.check import check
from millrace.graph.graph import Graph, feed_key
from millrace.graph.passes.microbatch import microbatch
from millrace.graph.passes.prune import prune
from millrace.graph.scopes import scope_of
from millrace.graph.trace import trace
from millrace.graph.training import training_graph
from millrace.graph.values import is_cheap
from millrace.partition.cut import cut
from millrace.partition.pieces import Piece, greedy_pieces
from millrace.partition.program import DeviceProgram, Partition, Recv, Run, Send

aten = torch.ops.aten
DEVICES = ("/host:0/cpu:0", "/host:0/cpu:1", "/host:1/cpu:0")
FOUR = (*DEVICES, "/host:1/cpu:1")
# MILLRACE_CASES=5000 asks for thousands of random cuts instead of hundreds; a graph is traced for every five of them.
CASES, CUTS_PER_GRAPH = int(os.environ.get("MILLRACE_CASES", "200")), 5


def same(graph: Graph, partition: Partition, steps: int = 2, compile: str = "eager") -> None:
    """Assert that it gives the same bits."""
    feeds = feeds_of(graph)
    expected, variables = whole(graph, feeds, steps)
    by_name = {feed_key(f.name): t for f, t in zip(graph.feeds, feeds, strict=True)}
    fetched, changed = run_partition(partition, graph.initial, by_name, steps, compile)
    for one, other in zip(fetched, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert equal_bits([one[name]], [other[name]]), name
    for name, value in variables.items():
        assert equal_bits([changed[name]], [value]), name


def invariants(graph: Graph, partition: Partition) -> None:
    """Assert what holds of every partition."""
    for program in partition.programs.values():
        have: set[str] = set()
        for instruction in program.instructions:
            if isinstance(instruction, Recv):
                edge = partition.edges[instruction.edge]
                assert edge.target == program.device
                have.add(edge.value)
            elif isinstance(instruction, Send):
                edge = partition.edges[instruction.edge]
                assert edge.source == program.device
                assert edge.value in have or edge.value in program.sent_variables
            else:
                segment = program.segments[instruction.segment]
                check(segment.graph)
                assert {i for i in segment.inputs if not i.startswith("feed:")} <= have
                have |= set(segment.outputs)
                have -= set(instruction.forget)
        assert have >= set(program.fetches)
    pairs = [(edge.value, edge.target) for edge in partition.edges]
    assert len(set(pairs)) == len(pairs)
    for program in partition.programs.values():
        readable_once(graph, partition, program)
    numbers = {type(i): [] for i in (Send(0), Recv(0))}
    for program in partition.programs.values():
        for instruction in program.instructions:
            if not isinstance(instruction, Run):
                numbers[type(instruction)].append(instruction.edge)
    assert sorted(numbers[Send]) == sorted(numbers[Recv]) == list(range(len(partition.edges)))


def readable_once(graph: Graph, partition: Partition, program: DeviceProgram) -> None:
    """Assert that what a segment may write over was made here, and goes to nobody else."""
    elsewhere = {edge.value for edge in partition.edges} | set(program.fetches) | set(graph.updates.values())
    made: set[str] = set()
    for instruction in program.instructions:
        if isinstance(instruction, Run):
            segment = program.segments[instruction.segment]
            assert made - elsewhere >= set(segment.writable) <= set(instruction.forget)
            made |= set(segment.outputs)


@pytest.mark.timeout(60 + CASES)
@settings(max_examples=CASES // CUTS_PER_GRAPH, deadline=None)
@given(program=programs, seed=st.integers(0, 2**32))
def test_any_placement_and_order_gives_the_same_bits(program: Program, seed: int) -> None:
    graph = program.graph()
    for index in range(CUTS_PER_GRAPH):
        partition = random_partition(graph, FOUR, seed + index)
        invariants(graph, partition)
        same(graph, partition)


def swap(v: dict[str, Any], x: Tensor) -> dict[str, Tensor]:
    old = v["a"] * 1.0
    v["a"], v["b"] = v["b"], v["a"]
    v["c"] = x
    v["d"] = v["c"].t()
    v["e"] = v["e"] + v["a"]
    return {"norm": (v["e"] - old).norm(), "moved": (v["e"] * 2 - v["f"]).sum(), "f": v["f"], "x": x}


def awkward() -> Graph:
    """Variables that take over others, a feed or a view; new values that are read beside old ones."""
    torch.manual_seed(3)
    return trace(swap, {n: torch.randn(4, 4, dtype=torch.float64) for n in "abcdef"}, torch.randn(4, 4).double())


def batch_norm() -> Graph:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3)
    )
    adam = torch.optim.AdamW(model.parameters(), lr=0.01)
    return training_graph(model.double(), lambda m, x: m(x).square().mean(), adam, torch.randn(2, 3, 8, 8).double())


def in_parts() -> Graph:
    """A batch in three parts, with sums of gradients: of products, norms and biases; clipped, and so read twice."""
    torch.manual_seed(0)
    layers = {"in": nn.Linear(5, 6), "norm": nn.LayerNorm(6), "tanh": nn.Tanh(), "out": nn.Linear(6, 4)}
    model = nn.Sequential(OrderedDict(layers)).double()
    adam = millrace.optim.adam(0.01, clip_norm=0.1)
    graph = training_graph(model, lambda m, x: m(x).pow(3).mean(), adam, torch.randn(6, 5).double())
    return microbatch(graph, 3)


@pytest.mark.parametrize("make", [awkward, batch_norm, branch_graph, deep_graph, in_parts, mlp_graph])
@pytest.mark.parametrize("seed", range(12))
def test_awkward_graphs_give_the_same_bits(make: Callable[[], Graph], seed: int) -> None:
    graph = make()
    partition = random_partition(graph, DEVICES, seed)
    invariants(graph, partition)
    same(graph, partition, steps=3)


def layers_on(graph: Graph, place: Mapping[str, str]) -> dict[str, str]:
    """Devices by the first part of the module's path."""
    return {node.name: place.get(scope_of(node).split(".")[0], DEVICES[1]) for node in graph.nodes}


def test_a_chain_of_layers_on_two_devices_needs_three_segments_and_two_edges_and_the_updates() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    graph = training_graph(model, lambda m, x: m(x).square().mean(), sgd, torch.randn(2, 8))
    graph = prune(graph, ["loss"], graph.updates)
    partition = cut(graph, greedy_pieces(graph, layers_on(graph, {"0": DEVICES[0], "1": DEVICES[0]})))
    activations = [edge for edge in partition.edges if edge.spec.shape]
    assert [(e.source, e.target) for e in activations] == [DEVICES[:2], DEVICES[1::-1]]
    assert [len(partition.programs[name].segments) for name in DEVICES[:2]] == [3, 2]  # the last is the update
    same(graph, partition)


def pieces_in_order(graph: Graph, device_of: Mapping[str, str]) -> list[Piece]:
    """The nodes in the graph's own order."""
    runs = groupby((node.name for node in graph.nodes), device_of.__getitem__)
    return [Piece(str(number), device, tuple(names)) for number, (device, names) in enumerate(runs)]


def test_a_view_that_goes_from_segment_to_segment_is_not_written_over() -> None:
    def step(_: Any, x: Tensor) -> dict[str, Tensor]:
        whole = x * 2
        return {"total": whole.t() + x.neg(), "sum": whole.sum()}

    graph = trace(step, {}, torch.randn(3, 3))
    device_of = {node.name: DEVICES[node.target is aten.neg.default] for node in graph.nodes}
    partition = cut(graph, pieces_in_order(graph, device_of))
    assert [len(partition.programs[name].segments) for name in DEVICES[:2]] == [2, 1]
    same(graph, partition)


def test_a_sum_that_goes_from_segment_to_segment_is_written_over() -> None:
    graph = in_parts()
    partition = cut(graph, pieces_in_order(graph, layers_on(graph, {"in": DEVICES[0]})))
    segments = [segment for program in partition.programs.values() for segment in program.segments]
    handed_on = {value for segment in segments for value in segment.writable}
    sums = [node for node in graph.nodes if node.target is aten.addmm.default and node.args[0].op == "call_function"]
    assert len(sums) == 4
    assert handed_on.issuperset(node.args[0].name for node in sums)
    written = Counter(n.target for s in segments for n in in_place(s.graph, s.writable).graph.nodes)
    assert written[aten.addmm_.default] == len(sums)
    invariants(graph, partition)
    same(graph, partition)


def test_a_view_of_the_batch_may_come_after_who_reads_it() -> None:
    """It is made again there; tasks are ordered by what has to be handed over."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 3)).double()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    graph = training_graph(model, lambda m, x: m(x).square().mean(), sgd, torch.randn(4, 2, 4).double())
    views = [node.name for node in graph.nodes if is_cheap(node)]
    others = [node.name for node in graph.nodes if node.name not in views]
    assert views
    same(graph, cut(graph, [Piece("all", DEVICES[0], tuple(others)), Piece("views", DEVICES[1], tuple(views))]))


def test_pieces_that_do_not_fit_are_refused() -> None:
    graph = mlp_graph()
    names = tuple(node.name for node in graph.nodes)
    with pytest.raises(GraphError, match="in no piece"):
        cut(graph, [Piece("a", "d", names[1:])])
    with pytest.raises(GraphError, match="listed twice"):
        cut(graph, [Piece("a", "d", names), Piece("b", "d", names[:1])])
    with pytest.raises(GraphError, match="reads"):
        cut(graph, [Piece("a", "d", names[5:]), Piece("b", "d", names[:5])])
