"""Graphs are grouped, placed by hints or by search, and the placement cuts into programs that compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.graph.programs import Program, programs
from tests.partition.test_cut import invariants, same
from torch import Tensor, nn

from millrace.errors import PlacementError
from millrace.graph.graph import Graph
from millrace.graph.passes.microbatch import microbatch
from millrace.graph.passes.prune import prune
from millrace.graph.passes.sparse_rows import sparse_rows
from millrace.graph.training import training_graph
from millrace.partition.cut import cut
from millrace.partition.narrow import narrow
from millrace.partition.placed import pieces_of
from millrace.place.cluster import Cluster, Device, Link
from millrace.place.grouping import group
from millrace.place.hints import Hints
from millrace.place.placement import Placement, follow, place
from millrace.place.tables import AFTER, tables
from millrace.place.wire import Wire

RATES = {"product": 1e9, "convolution": 1e9, "attention": 1e9, "memory": 1e9}
GPU = {"product": 1e11, "convolution": 1e11, "attention": 1e11, "memory": 1e10}


def cluster(cpus: int = 2, gpus: int = 0, bytes_per_s: float = 1e9) -> Cluster:
    devices = [Device(f"/host:0/gpu:{i}", "cuda", 1 << 30, GPU, 1e-6) for i in range(gpus)]
    devices += [Device(f"/host:0/cpu:{i}", "cpu", 1 << 34, RATES, 1e-6) for i in range(cpus)]
    return Cluster(tuple(devices), (Link("*", "*", 1e-5, bytes_per_s),))


class Towers(nn.Module):
    """Two branches and what joins them."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))
        self.right = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(x), self.right(x)], -1))


def towers(batch: int = 8) -> Graph:
    torch.manual_seed(0)
    model = Towers().double()
    data = (torch.randn(batch, 32).double(), torch.randint(0, 4, (batch,)))
    adam = torch.optim.AdamW(model.parameters(), lr=0.01)
    graph = training_graph(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), adam, data)
    return prune(graph, ["loss"], graph.updates)


def placed(graph: Graph, *arguments: Any, **settings: Any) -> Placement:
    return place(graph, *arguments, **{"budget_s": 0.3, **settings})


@settings(max_examples=40, deadline=None)
@given(program=programs, limit=st.integers(1, 12))
def test_tasks_hold_every_node_once_and_can_run_in_their_order(program: Program, limit: int) -> None:
    graph = program.graph()
    grouping = group(graph, lambda _: 1.0, lambda node, _: f" {hash(node.name) % 3}", limit=limit)
    seen: set[Any] = set()
    for task in grouping.tasks:
        for node in task.nodes:
            assert node not in seen
            assert all(a in seen for a in node.all_input_nodes if a.op == "call_function")
            seen.add(node)
    assert seen == set(graph.nodes)


def test_heavy_modules_are_divided_first() -> None:
    grouping = group(towers(), lambda node: 1.0, limit=5)
    assert {"head", "left.0", "left.1", "left.2"} - set(grouping.groups) or "right" in grouping.groups
    assert len(grouping.groups) <= 5
    whole = group(towers(), lambda node: 1.0, limit=50)
    assert {f"{side}.{i}" for side in ("left", "right") for i in range(3)} <= set(whole.groups)


def test_gradients_of_variables_wait_for_nobody_else() -> None:
    """The last of two stages sends its gradient on before it works out those of its variables."""
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(6)))
    batch = torch.randn(32, 64), torch.randint(0, 64, (32,))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    graph = training_graph(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), sgd, batch)
    grouping = group(graph, lambda node: 1.0)
    group_of = {node: task.group for task in grouping.tasks for node in task.nodes}
    last = [task for task in grouping.tasks if "gradients" in task.name]
    assert len(last) == 6
    for task in last:
        assert {group_of[u] for n in task.nodes for u in n.users if u in group_of} <= {task.group}
    # A forward pass, a backward pass of one product a layer, and the gradients of half of the layers at the same time.
    found = placed(graph, cluster(2), search="auto")
    alone_s = found.problem.seconds_TD[:, 0].sum()
    assert found.expected.step_s < 0.9 * alone_s


@pytest.mark.parametrize("search", ["auto", "heft", "round_robin", "pipeline", "expert"])
@pytest.mark.parametrize("count", [1, 4])
def test_a_placement_computes_what_the_whole_graph_does(search: str, count: int) -> None:
    graph = microbatch(towers(), count)
    placement = placed(graph, cluster(3, bytes_per_s=1e12), search=search)
    partition = cut(graph, pieces_of(placement), placement.homes)
    invariants(graph, partition)
    same(graph, partition)
    assert dict(partition.homes) == placement.homes
    assert placement.expected.fits


def test_hints_decide() -> None:
    hints = {"left": "cpu:1", "right.2": "/host:0/cpu:2", "head": "cpu:0"}
    found = placed(towers(), cluster(3), hints).device_of_group
    for name, device in found.items():
        if name.startswith("left"):
            assert device == "/host:0/cpu:1"
        if name.startswith("right.2"):
            assert device == "/host:0/cpu:2"
        if name.startswith("head"):
            assert device == "/host:0/cpu:0"


def test_hints_by_variable_operator_and_kind() -> None:
    hints = Hints(variables={"head.weight": "gpu"}, operators={"aten.cat.*": "cpu:1"})
    placement = placed(towers(), cluster(2, 1), hints)
    assert placement.homes["head.weight"] == placement.homes["optimizer/head.weight/exp_avg"] == "/host:0/gpu:0"
    tasks = {node.name: device for task, device in placement.ordered_tasks() for node in task.nodes}
    assert tasks["cat"] == "/host:0/cpu:1"


def test_what_belongs_together_stays_together() -> None:
    placement = placed(towers(), cluster(2), Hints(together=[("left.0", "right.2")]), search="round_robin")
    assert placement.homes["left.0.weight"] == placement.homes["right.2.weight"]
    assert "left.0 + right.2" in placement.device_of_group


def test_contradictions_are_refused_with_all_reasons() -> None:
    with pytest.raises(PlacementError, match=r"(?s)left.*cpu:0.*left\.1.*gpu"):
        placed(towers(), cluster(2, 1), {"left": "cpu:0", "left.1": "gpu"})
    with pytest.raises(PlacementError, match="asks for a gpu"):
        placed(towers(), cluster(2), {"left": "gpu"})
    with pytest.raises(PlacementError, match="'encoder' fits no module path"):
        placed(towers(), cluster(2), {"encoder": "cpu:0"})
    with pytest.raises(PlacementError, match="no device 'cpu:7'"):
        placed(towers(), cluster(2), {"left": "cpu:7"})


@torch.library.custom_op("millrace_place::halved", mutates_args=(), device_types="cpu")
def halved(x: Tensor) -> Tensor:
    return x / 2


@halved.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


halved.register_autograd(lambda ctx, gradient: gradient / 2)


def test_an_operator_without_a_kernel_for_a_kind_is_never_placed_there() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    graph = training_graph(model, lambda m, x: m[1](halved(m[0](x))).square().mean(), sgd, torch.randn(64, 64))
    graph = prune(graph, ["loss"], graph.updates)
    placement = placed(graph, cluster(1, 1))
    devices = {node.name: device for task, device in placement.ordered_tasks() for node in task.nodes}
    assert devices["halved"] == "/host:0/cpu:0"
    with pytest.raises(PlacementError, match=r"(?s)halved.*only for cpu"):
        placed(graph, cluster(1, 1), Hints(operators={"millrace_place.halved*": "gpu"}))


def test_memory_decides_where_a_table_goes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(400_000, 256), nn.Linear(256, 4))
    loss = lambda m, b: F.cross_entropy(m[1](m[0](b[0]).mean(1)), b[1])  # noqa: E731
    batch = (torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))
    adam = torch.optim.Adam(model.parameters(), lr=0.1)
    graph = training_graph(model, loss, adam, batch)
    graph = prune(graph, ["loss"], graph.updates)
    placement = placed(graph, cluster(1, 1))
    assert placement.homes["0.weight"] == "/host:0/cpu:0"  # three times 400 MB do not fit in 1 GiB
    with pytest.raises(PlacementError, match=r"(?i)(memory|fit)"):
        placed(graph, cluster(0, 2))


@pytest.mark.parametrize(("wire", "share"), [(None, 1.0), ("zeros", 1.0), ("bfloat16", 0.25), ("int8", 0.127)])
def test_narrowed_tensors_are_expected_to_take_their_share_of_the_bytes(wire: str | None, share: float) -> None:
    graph, slow = towers(batch=512), cluster(2, bytes_per_s=1e7)  # activations of 512 x 32 float64
    hints = {"left": "cpu:0", "right": "cpu:1", "head": "cpu:1"}
    plain, narrowed = placed(graph, slow, hints), placed(graph, slow, hints, wire=wire)
    before, after = (float(p.expected.bytes_DD.sum()) for p in (plain, narrowed))
    assert after == pytest.approx(share * before, rel=0.02)
    if share < 1:
        assert narrowed.expected.step_s < 0.7 * plain.expected.step_s
    assert narrowed.problem.bytes_K.tolist() == plain.problem.bytes_K.tolist()  # in memory they are whole again
    partition = narrow(cut(graph, pieces_of(narrowed)), graph, Wire.of(wire))
    assert partition.crossing_bytes() == after


def test_rows_of_a_table_are_looked_up_and_changed_where_they_lie() -> None:
    model = nn.Sequential(nn.Embedding(1_000_000, 64), nn.Linear(64, 4))
    loss = lambda m, b: F.cross_entropy(m[1](m[0](b[0])), b[1])  # noqa: E731
    batch = (torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int64))
    graph = training_graph(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), batch)
    graph = sparse_rows(prune(graph, ["loss"], graph.updates))
    expected = placed(graph, cluster(1)).expected
    table_bytes = 1_000_000 * 64 * 4
    assert expected.step_s < 0.1 * table_bytes / RATES["memory"]
    assert table_bytes < expected.peak_bytes_D[0] < 1.1 * table_bytes


def test_tensors_that_stay_together_count_as_one() -> None:
    problem = placed(towers(), cluster()).problem
    seen = set()
    for tensor, producer in enumerate(problem.producer_K.tolist()):
        readers = problem.uses_C[problem.first_use_K1[tensor] : problem.first_use_K1[tensor + 1]]
        if (problem.group_T[readers] == problem.group_T[producer]).all():
            assert (producer, *readers.tolist()) not in seen
            seen.add((producer, *readers.tolist()))
    assert seen


def test_states_live_in_slow_memory_where_fast_memory_lacks() -> None:
    """A GPU computes with weights that the host holds and updates: everything on it would need 100 MB, not 60."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(6)))
    batch = torch.randn(64, 1024), torch.randint(0, 1024, (64,))
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    graph = training_graph(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), adam, batch)
    graph = microbatch(prune(graph, ["loss"], graph.updates), 2)
    gpu, cpu = Device("/host:0/gpu:0", "cuda", 60_000_000, GPU, 1e-6), Device("/host:0/cpu:0", "cpu", 1 << 34, RATES)
    some = Cluster((gpu, cpu), (Link("*", "*", 1e-5, 1e10),))
    found = placed(graph, some, budget_s=1.0)
    assert found.states_apart
    assert found.expected.fits
    assert found.expected.step_s < 0.5 * placed(graph, some, search="local_search", budget_s=1.0).expected.step_s
    assert "/host:0/cpu:0" in found.homes.values()
    partition = cut(graph, pieces_of(found), found.homes)
    invariants(graph, partition)
    same(graph, partition)
    alike = follow(found, prune(graph, [], graph.updates))
    assert alike.states_apart
    assert alike.homes == found.homes
    roomy = placed(graph, cluster(1, 1))
    assert not roomy.states_apart


def test_a_microbatch_ends_without_waiting_for_later_ones() -> None:
    """Else a device that may hold few microbatches at a time (1F1B) would hold the first until the end of the step."""
    problem = placed(microbatch(towers(), 4), cluster()).problem
    phase_T = tables(problem).phase_T
    for tensor, producer in enumerate(problem.producer_K):
        for reader in problem.uses_C[problem.first_use_K1[tensor] : problem.first_use_K1[tensor + 1]]:
            if phase_T[reader] != AFTER:
                assert problem.microbatch_T[producer] <= problem.microbatch_T[reader]
    updates = [t for t, name in enumerate(problem.task_names_T) if "update" in name and not name.startswith("step ")]
    assert updates
    assert (phase_T[updates] == AFTER).all()
