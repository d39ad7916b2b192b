"""Nodes are measured one kind at a time, and what was measured counts before rates."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millrace.graph.graph import Graph
from millrace.graph.training import training_graph
from millrace.place.cluster import CLASSES, Cluster, Device, Link
from millrace.place.cost import works_of
from millrace.place.placement import place
from millrace.place.profile import Profile, kind_of, kinds_of, measure
from millrace.runtime.profiling import profile_on
from millrace.runtime.workers import ProcessWorkers

RATES = dict.fromkeys(CLASSES, 1e9)


class Sequences(nn.Module):
    """Words, an LSTM, attention over a broadcast mask, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(50, 16)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 50)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens_BT.shape[1])
        return self.head(self.layer(self.lstm(self.token(tokens_BT))[0], src_mask=mask)).flatten(0, 1)


def pictures() -> Graph:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 5)
    )
    return graph_of(model, (torch.randn(4, 3, 8, 8), torch.randint(0, 5, (4,))))


def sentences() -> Graph:
    return graph_of(Sequences(), (torch.randint(0, 50, (3, 7)), torch.randint(0, 50, (21,))))


def graph_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Graph:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return training_graph(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), optimizer, batch)


class Silent:
    """Workers that are not to be asked."""

    def ask(self, messages: object, timeout_s: float) -> object:
        raise AssertionError(messages)


def test_a_gpu_keeps_to_its_rates() -> None:
    profile = profile_on(Silent(), [Device("/host:0/gpu:0", "cuda", 1, RATES)], pictures(), fused=False)  # type: ignore[arg-type]
    assert profile == Profile()


@pytest.mark.parametrize("make", [pictures, sentences])
@pytest.mark.parametrize("fused", [False, True])
def test_every_kind_of_node_runs_on_noise(make: Callable[[], Graph], fused: bool) -> None:
    graph = make()
    kinds = kinds_of(graph, fused=fused)
    found = measure(kinds, budget_s=60.0)
    assert found.keys() == kinds.keys()
    assert all(seconds > 0 for seconds in found.values())
    computing = [work.node for work in works_of(graph.nodes, fused=fused) if work.node is not None]
    assert {kind_of(node) for node in computing} == set(kinds)
    assert fused or len(kinds) < len(computing)  # equal nodes are measured once


def test_no_time_is_no_measurement() -> None:
    assert measure(kinds_of(pictures(), fused=False), budget_s=-1.0) == {}


def test_what_was_measured_counts_before_rates() -> None:
    graph = pictures()
    device = Device("/host:0/cpu:0", "cpu", 2**34, RATES, 1e-6)
    works = works_of(graph.nodes, fused=False)
    product = next(work for work in works if work.flops)
    assert product.node is not None
    profile = Profile({device.name: {kind_of(product.node): 7.0}}, {device.name: {kind_of(product.node): 9.0}})
    assert profile.seconds(product, device, among_others=False) == 7.0
    assert profile.seconds(product, device, among_others=True) == 9.0
    other = next(work for work in works if work.node is not None and kind_of(work.node) != kind_of(product.node))
    assert profile.seconds(other, device, among_others=False) == other.seconds(device)


def test_two_workers_measure_what_they_will_run() -> None:
    graph = pictures()
    devices = tuple(Device(f"/host:0/cpu:{n}", "cpu", 2**32, RATES, 1e-6) for n in range(2))
    cluster = Cluster(devices, (Link("*", "*", 1e-5, 1e9),))
    workers = ProcessWorkers(devices)
    try:
        profile = profile_on(workers, devices, graph, fused=False, budget_s=30.0)
    finally:
        workers.close()
    kinds = kinds_of(graph, fused=False).keys()
    for device in devices:
        assert profile.alone[device.name].keys() == profile.busy[device.name].keys() == kinds
    placement = place(graph, cluster, search="expert", fused=False, profile=profile)
    busy = profile.busy[devices[0].name]
    total_s = sum(busy[kind_of(w.node)] for w in works_of(graph.nodes, fused=False) if w.node is not None)
    assert placement.problem.seconds_TD[:, 0].sum() == pytest.approx(total_s)
    assert placement.problem.alone_s_TD is not None
    assert np.all(placement.problem.alone_s_TD <= placement.problem.seconds_TD)
