"""A graph whose wide layers are split trains as the whole one does, and no block sees another's weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node

from millrace.errors import FeedError, GraphError
from millrace.graph.check import check
from millrace.graph.graph import Graph, info
from millrace.graph.parts import whole_variables
from millrace.graph.passes.prune import prune
from millrace.graph.passes.splitting.layouts import reshaped
from millrace.graph.passes.splitting.split import joined, split
from millrace.graph.passes.splitting.values import even
from millrace.graph.save import load_graph, save_graph
from millrace.graph.signature import Role
from millrace.graph.text import to_text
from millrace.graph.trace import trace
from millrace.graph.training import training_graph
from millrace.optim import adam, adamw, momentum
from millrace.runtime.session import Session

from .programs import equal_bits, run

aten = torch.ops.aten

OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
    "Adam": lambda m: torch.optim.Adam(m.parameters()),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters()),
    "momentum, pure": lambda _: momentum(0.1),
    "adam": lambda _: adam(1e-3),
    "adamw, clipped": lambda _: adamw(1e-3, clip_norm=0.1),
}


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def classify(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def step_of(model: nn.Module, batch: Any, optimizer: str = "momentum") -> Graph:
    return training_graph(model, classify, OPTIMIZERS[optimizer](model), batch)


def same_steps(graph: Graph, divided: Graph, batch: Any, steps: int = 3) -> None:
    """Assert that both train alike for three steps: fetches and, put together, variables."""
    check(divided)
    assert list(divided.fetches) == list(graph.fetches)
    one, other = (run(g, g.initial, list(batch), steps) for g in (graph, divided))
    count = steps * len(graph.fetches)
    for expected, found in zip(one[:count], other[:count], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    variables = dict(zip((v.name for v in divided.variables), other[count:], strict=True))
    assembled = whole_variables(divided.variables, variables)
    assert assembled.keys() == {v.name for v in graph.variables}
    for variable, expected in zip(graph.variables, one[count:], strict=True):
        torch.testing.assert_close(assembled[variable.name], expected, rtol=1e-9, atol=1e-12)


def weights_stay(divided: Graph) -> None:
    """Assert that every block computes with its own blocks of variables, and no other node with any."""
    inputs = divided.placeholders()
    numbers: dict[str, int] = {}
    for variable in divided.variables:
        if variable.part is None:
            continue
        block = numbers.get(variable.part.whole, 0)
        numbers[variable.part.whole] = block + 1
        for user in inputs[variable.name].users:
            assert user.op == "output" or info(user).block == block, f"{user.name} reads {variable.name}"
    for node in divided.nodes:
        if node.target is aten.cat.default:
            assert not any(_is_weight(source) for source in node.all_input_nodes), f"{node.name} joins a variable"


def _is_weight(node: Node) -> bool:
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.op == "placeholder" and not node.name.startswith("feed")


def blocks_of(divided: Graph, whole: str) -> list[str]:
    return [v.name for v in divided.variables if v.part is not None and v.part.whole == whole]


def without_gradients(graph: Graph) -> Graph:
    return prune(graph, ["loss"], graph.updates)


relaxed = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


@relaxed
@given(
    widths=st.lists(st.integers(2, 11), min_size=1, max_size=3),
    parts=st.integers(2, 4),
    bias=st.booleans(),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    least=st.integers(1, 8),
)
def test_any_perceptron_trains_alike(widths: list[int], parts: int, bias: bool, optimizer: str, least: int) -> None:
    sizes = [5, *widths, 3]
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out, bias=bias), nn.Tanh()]
    model = nn.Sequential(*layers[:-1])
    batch = torch.randn(6, 5), torch.randint(0, 3, (6,))
    graph = step_of(model, batch, optimizer)
    divided = split(graph, parts, min_width=least)
    same_steps(graph, divided, batch)
    weights_stay(without_gradients(divided))
    specs = {v.name: v.spec for v in graph.variables}
    for name, spec in specs.items():
        blocks = [v for v in divided.variables if v.part is not None and v.part.whole == name]
        if not blocks:
            assert not name.endswith("weight") or spec.shape[0] < max(least, parts)
            continue
        assert len(blocks) == parts
        assert sum(v.spec.size_bytes for v in blocks) == spec.size_bytes
        assert max(v.spec.size_bytes for v in blocks) <= spec.size_bytes / parts + spec.size_bytes / spec.shape[0] * 4
        owners = {v.name: v.owner for v in blocks}
        assert all(owner in {v.name for v in divided.variables} for owner in owners.values())


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 2, padding=1, groups=4, bias=False),
        nn.BatchNorm2d(12, momentum=0.3),
        nn.GELU(),
        nn.Conv2d(12, 6, 1),
        nn.AdaptiveAvgPool2d(2),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(24, 9),
        nn.ReLU(),
        nn.Linear(9, 4),
    )


class LanguageModel(nn.Module):
    def __init__(self, tied: bool, padding: int | None = None) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6, padding_idx=padding)
        self.mix = nn.Linear(6, 6)
        self.out = nn.Linear(6, 11)
        if tied:
            self.out.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(F.gelu(self.mix(self.words(tokens))))


class Attention(nn.Module):
    """One block of a transformer with projections of their own for queries, keys and values."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 4)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.fused:
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            seen = (q @ k.transpose(-2, -1) / math.sqrt(2)).softmax(-1) @ v
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return self.head(x + self.down(F.silu(self.up(self.norm(x)))))


def encoder() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), nn.Linear(8, 4))


class Constants(nn.Module):
    """Tensors that are no parameters, joins and slices, and an operator that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(16, 4)
        self.scale = torch.rand(8)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x) * self.scale, self.b(x).cumsum(-1)
        return self.out(torch.cat([a, b], -1)[:, :16]) + a.std(-1, keepdim=True)


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 9, 9), torch.randint(0, 4, (4,))


def words() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 11, (4, 3)), torch.randint(0, 11, (4, 3))


def sequences() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 8), torch.randint(0, 4, (2, 3))


def rows() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 5), torch.randint(0, 4, (6,))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], set[str]]] = {
    "cnn": (cnn, images, {"0.weight", "1.running_mean", "4.weight", "5.weight", "7.weight", "7.bias", "11.weight"}),
    "language model": (
        lambda: LanguageModel(False, 2),
        words,
        {"words.weight", "mix.weight", "out.weight", "out.bias"},
    ),
    "tied": (lambda: LanguageModel(True), words, {"words.weight", "mix.bias", "out.bias"}),
    "attention": (lambda: Attention(False), sequences, {"q.weight", "out.weight", "up.bias", "down.weight"}),
    "fused attention": (lambda: Attention(True), sequences, {"q.weight", "v.bias", "up.weight"}),
    "encoder": (encoder, sequences, {"0.linear1.weight", "0.linear1.bias", "0.linear2.weight"}),
    "constants": (Constants, rows, {"a.weight", "b.bias"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_every_kind_train_alike(name: str) -> None:
    model, batch, expected = MODELS[name]
    batch = batch()
    graph = step_of(model(), batch)
    divided = split(graph, 4, min_width=6)
    same_steps(graph, divided, batch)
    assert {v.part.whole for v in divided.variables if v.part is not None} >= expected


@pytest.mark.parametrize("name", ["cnn", "language model", "attention"])
def test_weights_of_known_layers_never_travel(name: str) -> None:
    model, batch, _ = MODELS[name]
    divided = without_gradients(split(step_of(model(), batch()), 2, min_width=6))
    weights_stay(divided)
    assert {info(n).block for n in divided.nodes} == {None, 0, 1}


def test_fused_attention_runs_by_heads() -> None:
    divided = without_gradients(split(step_of(Attention(True), sequences()), 4, min_width=8))
    attending = [n for n in divided.nodes if "scaled_dot_product" in str(n.target)]
    assert [info(n).block for n in attending] == [0, 1, 2, 3, 0, 1, 2, 3]


class Recurrent(nn.Module):
    def __init__(self, cell: str) -> None:
        super().__init__()
        self.cell = nn.LSTM(6, 8, batch_first=True) if cell == "lstm" else nn.GRUCell(6, 8)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.cell, nn.LSTM):
            return self.out(self.cell(x)[0])
        hidden, found = x.new_zeros(len(x), 8), []
        for now in x.unbind(1):
            hidden = self.cell(now, hidden)
            found.append(hidden)
        return self.out(torch.stack(found, 1))


@pytest.mark.parametrize("cell", ["lstm", "cell"])
def test_recurrent_layers_stay_whole(cell: str) -> None:
    batch = torch.randn(4, 3, 6), torch.randint(0, 8, (4, 3))
    graph = step_of(Recurrent(cell), batch)
    divided = split(graph, 2, min_width=8)
    same_steps(graph, divided, batch)
    wholes = {v.part.whole for v in divided.variables if v.part is not None and v.role is Role.PARAMETER}
    assert wholes == {"out.weight", "out.bias"}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_labels_that_are_ignored_count_for_nothing(reduction: str) -> None:
    model, batch = nn.Linear(5, 9), (torch.randn(6, 5), torch.tensor([0, -100, 8, 3, -100, 5]))

    def loss(m: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(m(batch[0]), batch[1], reduction=reduction).mean()

    graph = training_graph(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), batch)
    divided = split(graph, 3, min_width=9)
    assert not any(n.target is aten.cat.default for n in without_gradients(divided).nodes)
    same_steps(graph, divided, batch)


def test_classes_in_the_middle_train_alike() -> None:
    """Scores [B, V, T], whose gradient has to be contiguous although blocks put together lie otherwise."""
    model, batch = LanguageModel(False, 2), words()

    def loss(m: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(m(batch[0]).transpose(1, 2), batch[1])

    graph = training_graph(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), batch)
    same_steps(graph, split(graph, 2, min_width=6), batch)


def test_only_wide_layers_are_split_and_one_part_changes_nothing() -> None:
    batch = rows()
    graph = step_of(nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 4)), batch)
    assert split(graph, 1) is graph
    assert split(graph, 4, min_width=100).variables == graph.variables
    divided = split(graph, 4, min_width=16)
    assert blocks_of(divided, "0.weight") == ["0.weight[0:4]", "0.weight[4:8]", "0.weight[8:12]", "0.weight[12:16]"]
    assert blocks_of(divided, "2.weight") == []
    slot = divided.variable("optimizer/0.bias/momentum_buffer[4:8]")
    assert (slot.role, slot.owner) == (Role.OPTIMIZER, "0.bias[4:8]")
    with pytest.raises(GraphError, match="split before"):
        split(divided, 2)
    with pytest.raises(GraphError, match="parts=0"):
        split(graph, 0)


def test_a_session_trains_the_callers_own_tensors_and_splits_again_for_another_shape(tmp_path: Path) -> None:
    model, other = (nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    batches = [rows(), (torch.randn(3, 5), torch.randint(0, 4, (3,))), rows()]
    quiet: dict[str, Any] = {"compile": "eager", "warn_new_shape": False}
    whole = Session(step_of(other, batches[0], "Adam"), **quiet)
    divided = Session(split(step_of(model, batches[0], "Adam"), 4, min_width=16), **quiet)
    for batch in batches:
        gradients = [s.run(["train", "loss", "gradient/0.weight"], batch)[1:] for s in (whole, divided)]
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    divided.save(tmp_path / "variables.safetensors")
    before = {name: tensor.clone() for name, tensor in divided.variables.items()}
    divided.run("train", batches[0])
    divided.restore(tmp_path / "variables.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in divided.variables.items())


def test_numbers_out_of_range_are_found_as_before() -> None:
    tokens, labels = words()
    session = Session(split(step_of(LanguageModel(False), (tokens, labels)), 4, min_width=6), compile="eager")
    for wrong in ((tokens.index_fill(1, torch.tensor([1]), 11), labels), (tokens, labels - 1000)):
        with pytest.raises(FeedError, match="out of range"):
            session.run("loss", wrong)
    assert torch.isfinite(session.run("loss", (tokens, labels * 0 - 100)).isnan().double())


def test_a_split_graph_comes_back_from_a_file(tmp_path: Path) -> None:
    batch = words()
    divided = split(step_of(LanguageModel(True), batch), 3, min_width=6)
    save_graph(divided, tmp_path / "step.graph")
    loaded = load_graph(tmp_path / "step.graph")
    assert to_text(loaded) == to_text(divided)
    assert loaded.variables == divided.variables
    assert [info(n) for n in loaded.nodes] == [info(n) for n in divided.nodes]
    assert equal_bits(run(loaded, divided.initial, list(batch)), run(divided, divided.initial, list(batch)))
    whole = step_of(LanguageModel(True), batch)
    save_graph(whole, tmp_path / "whole.graph")
    assert to_text(split(load_graph(tmp_path / "whole.graph"), 3, min_width=6)) == to_text(divided)


def test_text_names_the_blocks() -> None:
    text = to_text(split(step_of(nn.Linear(5, 16), rows()), 2, min_width=16))
    assert "| block 1" in text
    assert "\nupdate weight\n" in text
    assert "update weight[" not in text


def test_parts_with_a_gap_and_odd_blocks_are_found_by_the_checker() -> None:
    divided = split(step_of(nn.Linear(5, 16), rows()), 2, min_width=16)
    broken = [
        replace(v, part=replace(v.part, start=9, stop=17)) if v.name == "bias[8:16]" and v.part else v
        for v in divided.variables
    ]
    with pytest.raises(GraphError, match=r"'bias\[8:16\]' begins at 9"):
        check(divided.with_(variables=tuple(broken)))
    node = next(n for n in divided.nodes if info(n).block == 1)
    meta = dict(node.meta)
    node.meta["millrace"] = replace(info(node), block=-1)
    with pytest.raises(GraphError, match="is of block -1"):
        check(divided)
    node.meta = meta


def test_a_step_of_ones_own_is_split() -> None:
    def step(v: dict[str, Any], x: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(x @ v["w"].t())
        loss = (hidden @ v["u"]).pow(2).mean()
        gw, gu = torch.autograd.grad(loss, [v["w"], v["u"]])
        scale = 1 / (gw.norm() + gu.norm())
        v["w"], v["u"] = v["w"] - scale * gw, v["u"] - scale * gu
        return {"loss": loss, "hidden": hidden}

    tensors = {"w": torch.randn(8, 5, requires_grad=True), "u": torch.randn(8, 9, requires_grad=True)}
    x = torch.randn(6, 5)
    graph = trace(step, tensors, x)
    divided = split(graph, 4, min_width=8)
    assert blocks_of(divided, "w") == ["w[0:2]", "w[2:4]", "w[4:6]", "w[6:8]"]
    assert blocks_of(divided, "u") == [], "its columns lie apart in memory"
    same_steps(graph, divided, [x])
    weights_stay(divided)


@given(
    factors=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    cuts=st.lists(st.booleans(), min_size=4, max_size=4),
    dim=st.integers(0, 3),
    parts=st.integers(1, 3),
)
def test_blocks_of_a_reshaped_tensor_are_reshaped_blocks(
    factors: list[int], cuts: list[bool], dim: int, parts: int
) -> None:
    """Some dimensions of a random shape merged: blocks along the result are the blocks of before, both ways."""
    merged: list[int] = []
    for factor, cut in zip(factors, cuts, strict=False):
        if merged and not cut:
            merged[-1] *= factor
        else:
            merged.append(factor)
    value = torch.arange(math.prod(factors))
    for old, new in ((factors, merged), (merged, factors)):
        along = even(old[dim % len(old)], parts, dim % len(old))
        after = reshaped(old, new, along)
        if after is None:
            continue
        befores = value.view(old).split(along.sizes(), along.dim)
        afters = value.view(new).split(after.sizes(), after.dim)
        assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(befores, afters, strict=True))
        assert reshaped(new, old, after) is not None or 1 in old
    merged_first = reshaped(factors, merged, even(factors[0], parts, 0))
    assert merged_first is not None or math.prod(factors) == 1 or factors[0] == 1


@pytest.mark.long
def test_a_split_graph_compiles() -> None:
    batch = rows()
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8))

    def loss(m: nn.Module, batch: Any) -> Tensor:
        return m(batch[0]).pow(2).mean()

    graph = split(training_graph(model, loss, OPTIMIZERS["SGD"](model), batch), 2, min_width=8)
    compiled, eager = Session(graph, compile="inductor", copy=True), Session(graph, compile="eager", copy=True)
    for _ in range(2):
        losses = [session.run(["train", "loss"], batch)[1] for session in (compiled, eager)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=0)
    assert compiled.last_tier == "inductor"
    for name, tensor in eager.variables.items():
        torch.testing.assert_close(compiled.variables[name], tensor, rtol=1e-9, atol=1e-12)


def test_blocks_are_put_together_by_their_names() -> None:
    model = nn.Sequential(nn.Linear(5, 128), nn.ReLU(), nn.Linear(128, 96))
    graph = training_graph(model, lambda m, b: m(b).square().mean(), adam(0.01), torch.randn(2, 5))
    blocks = split(graph, 3).initial
    assert blocks.keys() != graph.initial.keys()
    whole = joined(dict(reversed(blocks.items())))
    assert whole.keys() == graph.initial.keys()
    assert all(value.equal(graph.initial[name]) for name, value in whole.items())
    wide = torch.arange(24.0).reshape(2, 12)
    parts = {"w[:, 10:12]": wide[:, 10:], "w[:, 2:10]": wide[:, 2:10], "w[:, 0:2]": wide[:, :2]}
    assert joined(parts)["w"].equal(wide)
