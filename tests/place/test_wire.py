"""Which tensors of a step are narrowed: those that a user asked for, and none that last."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from millrace.errors import SettingError
from millrace.graph.graph import Graph, info
from millrace.graph.signature import Phase, TensorSpec
from millrace.graph.trace import trace
from millrace.graph.training import training_graph
from millrace.place.wire import CODECS, LEAST_BYTES, Wire, can_narrow, expected_bytes


@pytest.fixture(scope="module")
def graph() -> Graph:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("encoder", nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.ReLU()))
    model.add_module("head", nn.Linear(96, 40))
    adam = torch.optim.AdamW(model.parameters(), lr=0.1)
    return training_graph(model, lambda m, x: m(x).square().mean(), adam, torch.randn(64, 64))


def test_nothing_is_narrowed_unless_asked(graph: Graph) -> None:
    for nothing in (None, {}):
        assert Wire.of(nothing).codecs(graph) == {}


@pytest.mark.parametrize("codec", CODECS)
def test_one_codec_is_for_all_activations_and_gradients_that_are_large(graph: Graph, codec: str) -> None:
    found = Wire.of(codec).codecs(graph)
    phases = set()
    for name, given_codec in found.items():
        node = graph.node(name)
        assert given_codec == codec
        assert node.op == "call_function"
        assert name not in graph.updates.values()
        assert TensorSpec.of(node.meta["val"]).size_bytes >= LEAST_BYTES
        phases.add(info(node).phase)
    assert phases == {Phase.FORWARD, Phase.BACKWARD}


def test_patterns_are_of_modules_and_tensors_and_the_first_counts(graph: Graph) -> None:
    relu = next(n.name for n in graph.nodes if "relu" in str(n.target))
    inner = Wire.of({relu: "zeros", "encoder": "int8"}).codecs(graph)
    assert inner[relu] == "zeros"
    assert set(inner.values()) == {"zeros", "int8"}
    assert {info(graph.node(name)).scope.split(".")[0] for name in inner} == {"encoder"}
    assert Wire.of({"encoder": "int8", relu: "zeros"}).codecs(graph)[relu] == "int8"


def test_a_variable_is_narrowed_only_by_its_name(graph: Graph) -> None:
    weight = graph.placeholders()["encoder.0.weight"].name
    assert weight not in Wire.of({"*": "int8", "encoder.*": "int8"}).codecs(graph)
    assert Wire.of({"encoder.0.weight": "bfloat16"}).codecs(graph) == {weight: "bfloat16"}


def test_a_variable_that_another_one_takes_over_is_never_narrowed() -> None:
    def step(v: dict[str, Any], x: Tensor) -> dict[str, Tensor]:
        v["a"] = v["b"]
        return {"sum": (v["a"] * x).sum()}

    taking = trace(step, {name: torch.randn(64, 64) for name in "ab"}, torch.randn(64, 64))
    assert Wire.of({"a": "int8", "b": "int8"}).codecs(taking).keys() <= {"a"}


def test_what_is_misspelt_is_refused_with_what_there_is(graph: Graph) -> None:
    for wrong in ("int4", {"encoder": "bf16"}):
        with pytest.raises(SettingError, match="bfloat16, int8, zeros"):
            Wire.of(wrong)
    with pytest.raises(SettingError, match="bfloat16, int8, zeros"):
        Wire.of(8)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="encoder"):
        Wire.of({"encodr.*": "int8"}).check(graph)
    Wire.of({"encoder.*": "int8", "head.weight": "bfloat16", "relu*": "zeros", "*": "zeros"}).check(graph)


@given(st.sampled_from(CODECS), st.sampled_from((torch.float16, torch.float32, torch.float64)), st.integers(0, 10**7))
def test_what_may_be_narrowed_is_not_expected_to_grow(codec: str, dtype: torch.dtype, n: int) -> None:
    spec = TensorSpec((n,), dtype)
    if can_narrow(codec, spec):
        assert expected_bytes(codec, spec) <= spec.size_bytes
        assert codec == "zeros" or expected_bytes(codec, spec) <= 0.51 * spec.size_bytes
    assert expected_bytes(None, spec) == spec.size_bytes
    assert not can_narrow(codec, TensorSpec((n,), torch.int64))
