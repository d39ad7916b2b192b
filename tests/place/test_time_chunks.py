"""Recurrent layers on devices of their own work like a wave, once they are in chunks of time."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.partition.test_cut import invariants
from torch import Tensor, nn

from millrace.graph.graph import Graph
from millrace.graph.passes.microbatch import microbatch
from millrace.graph.passes.prune import prune
from millrace.graph.passes.time_chunks import time_chunks
from millrace.graph.training import training_graph
from millrace.partition.cut import cut
from millrace.partition.placed import pieces_of
from millrace.place.chrome_trace import Span, expected_spans
from millrace.place.cluster import Cluster, Device, Link
from millrace.place.grouping import group
from millrace.place.placement import Placement, place

RATES = {"product": 1e9, "convolution": 1e9, "attention": 1e9, "memory": 1e10}
TWO = Cluster(
    tuple(Device(f"/host:0/cpu:{i}", "cpu", 1 << 34, RATES, 1e-6) for i in range(2)), (Link("*", "*", 1e-5, 1e9),)
)
STEPS, COUNT, WIDTH = 8, 4, 32


class Stack(nn.Module):
    """Two recurrent layers of a kind."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.low, self.high = kind(WIDTH, WIDTH), kind(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.high(self.low(x)[0])[0]


class Cells(Stack):
    """The same, written as a loop."""

    def __init__(self) -> None:
        super().__init__(nn.LSTMCell)

    def forward(self, x: Tensor) -> Tensor:
        low = high = (x.new_zeros(COUNT, WIDTH),) * 2
        found = []
        for step in x:
            low = self.low(step, low)
            high = self.high(low[0], high)
            found.append(high[0])
        return torch.stack(found)


@functools.cache
def graph_of(kind: str) -> Graph:
    torch.manual_seed(0)
    made: dict[str, Any] = {"lstm": lambda: Stack(nn.LSTM), "gru": lambda: Stack(nn.GRU), "cells": Cells}
    model = made[kind]()
    data = (torch.randn(STEPS, COUNT, WIDTH), torch.randn(STEPS, COUNT, WIDTH))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    graph = training_graph(model, lambda m, b: F.mse_loss(m(b[0]), b[1]), sgd, data)
    return prune(graph, ["loss"], graph.updates)


def apart(graph: Graph) -> Placement:
    return place(graph, TWO, {"low": "cpu:0", "high": "cpu:1"}, budget_s=0.2, fused=False)


def span(spans: list[Span], module: str, task: str) -> Span:
    (found,) = [one for one in spans if one.name.startswith(f"{module} on") and one.name.endswith(f" {task}")]
    return found


@pytest.mark.parametrize("kind", ["lstm", "gru", "cells"])
def test_the_upper_layer_begins_when_the_first_chunk_is_there(kind: str) -> None:
    spans = expected_spans(apart(time_chunks(graph_of(kind), 4)))
    find = functools.partial(span, spans)
    assert find("high", "forward 0 chunk 0").start_s < find("low", "forward 0 chunk 1").end_s
    assert find("high", "forward 0 chunk 1").start_s < find("low", "forward 0 chunk 3").end_s
    assert find("low", "gradients 0 chunk 3").start_s < find("high", "backward 0 chunk 2").end_s
    assert find("low", "gradients 0 chunk 2").start_s < find("high", "backward 0 chunk 0").end_s


@pytest.mark.parametrize("kind", ["lstm", "gru", "cells"])
def test_more_chunks_take_less_time(kind: str) -> None:
    seconds = [apart(time_chunks(graph_of(kind), chunks)).expected.step_s for chunks in (1, 2, 4)]
    assert seconds[0] > 1.15 * seconds[1] > 1.15 * seconds[2]


@pytest.mark.parametrize("kind", ["lstm", "cells"])
def test_a_module_has_one_task_for_each_chunk(kind: str) -> None:
    graph = time_chunks(graph_of(kind), 4)
    names = [task.name for task in group(graph, lambda _: 1.0).tasks]
    # Nothing waits for the gradients of the lower layer.
    for part in ("low forward", "low gradients", "high forward", "high backward"):
        inside = [name for name in names if name.startswith(f"{part} 0 chunk")]
        assert sorted(inside) == [f"{part} 0 chunk {chunk}" for chunk in range(4)]


def test_layers_of_one_module_have_places_of_their_own() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(WIDTH, WIDTH, 2)
    data = torch.randn(STEPS, COUNT, WIDTH)
    sgd = torch.optim.SGD(lstm.parameters(), lr=0.1)
    graph = training_graph(nn.Sequential(lstm), lambda m, x: m(x)[0].square().mean(), sgd, data)
    found = place(graph, TWO, {"0.l0": "cpu:0", "0.l1": "cpu:1"}, budget_s=0.2)
    for name in ("weight_ih", "weight_hh", "bias_ih"):
        assert found.homes[f"0.{name}_l0"] == "/host:0/cpu:0"
        assert found.homes[f"0.{name}_l1"] == "/host:0/cpu:1"


def test_chunks_of_microbatches_can_be_cut() -> None:
    graph = graph_of("cells")
    parts = prune(microbatch(time_chunks(graph, 2), 2), ["loss"], graph.updates)
    found = apart(parts)
    invariants(parts, cut(parts, pieces_of(found)))
    names = [task.name for task, _ in found.ordered_tasks()]
    for task in (f"forward {part} chunk {chunk}" for part in range(2) for chunk in range(2)):
        assert {f"low on cpu:0 {task}", f"high on cpu:1 {task}"} <= set(names)
