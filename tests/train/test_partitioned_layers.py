"""Layers that follow the partitions compute what separate layers would, and save what crosses between blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from millrace.errors import SettingError
from millrace.graph.passes.prune import prune
from millrace.graph.passes.splitting.crossings import crossing_bytes
from millrace.graph.passes.splitting.split import split
from millrace.graph.training import training_graph
from millrace.train.partitioned_layers import GroupedLinear, partitioned_stack


@settings(max_examples=20, deadline=None)
@given(
    blocks=st.integers(1, 4),
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 3),
    bias=st.booleans(),
    lead=st.lists(st.integers(1, 3), max_size=2),
)
def test_each_block_is_a_linear_layer_of_its_own(
    blocks: int, inputs: int, outputs: int, bias: bool, lead: list[int]
) -> None:
    layer = GroupedLinear(blocks * inputs, blocks * outputs, blocks, bias=bias)
    x = torch.randn(*lead, blocks * inputs)
    parts = [
        F.linear(part, layer.weight[k], None if layer.bias is None else layer.bias[k, 0])
        for k, part in enumerate(x.split(inputs, -1))
    ]
    torch.testing.assert_close(layer(x), torch.cat(parts, -1))


def test_the_fewer_layers_exchange_the_less_crosses_between_blocks() -> None:
    sizes, batch = [12, 64, 64, 64, 64, 64], (torch.randn(8, 12), torch.randint(0, 64, (8,)))
    crossing = {}
    for every in (1, 2, 4):
        model = partitioned_stack(sizes, 4, exchange_every=every)
        dense = [isinstance(layer, nn.Linear) for layer in model[::2]]
        assert dense == [number % every == 0 for number in range(5)]
        graph = split(training_graph(model, classify, torch.optim.SGD(model.parameters(), lr=0.1), batch), 4)
        crossing[every] = crossing_bytes(prune(graph, ["loss"], graph.updates))
    # Of four exchanges between five layers, one of two and then all but one are left out.
    assert crossing[2] < 0.6 * crossing[1]
    assert crossing[4] < 0.5 * crossing[1]


def test_a_grouped_layer_between_blocks_hands_nothing_over() -> None:
    batch = (torch.randn(8, 12), torch.randint(0, 64, (8,)))
    crossing = []
    for depth in (2, 3):
        model = partitioned_stack([12] + [64] * depth, 4, exchange_every=9)
        graph = split(training_graph(model, classify, torch.optim.SGD(model.parameters(), lr=0.1), batch), 4)
        assert {v.name for v in graph.variables if v.part is not None} >= {"2.weight[0:1]", "2.bias[3:4]"}
        crossing.append(crossing_bytes(prune(graph, ["loss"], graph.updates)))
    # A layer more costs only what its optimizer reads: the learning rate, for its weight and its bias.
    assert crossing[1] - crossing[0] <= 64


def classify(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def test_features_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(SettingError, match="in_features=10 cannot be divided into 4"):
        GroupedLinear(10, 8, 4)
    with pytest.raises(SettingError, match="out_features=9"):
        GroupedLinear(8, 9, 4)
    with pytest.raises(SettingError, match="exchange_every=0"):
        partitioned_stack([4, 4], 2, exchange_every=0)
