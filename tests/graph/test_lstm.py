"""LSTM layers as single nodes: the numbers of torch.lstm, and the written-out form wherever the kernel does not fit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from millrace.compile.eager import compile_eager
from millrace.errors import TraceError
from millrace.graph.graph import Graph
from millrace.graph.tracing import lstm
from millrace.graph.training import training_graph

KERNEL = "millrace.lstm_layer.default"


class Last(nn.Module):
    """An LSTM whose outputs and last states all reach the result."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 6, 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        y, (h, c) = self.lstm(x)
        return y.square().mean() + h.mean() + c.square().mean()


def _loss(model: Any, x: Tensor) -> Tensor:
    return model(x)


def _kernels(graph: Graph) -> int:
    return sum(str(node.target) == KERNEL for node in graph.nodes)


@pytest.mark.parametrize(
    ("options", "layers"), [({}, 2), ({"batch_first": True}, 2), ({"bidirectional": True}, 4)], ids=str
)
def test_training_equals_eager(options: dict[str, Any], layers: int) -> None:
    torch.manual_seed(0)
    model = Last(**options)
    reference = copy.deepcopy(model)
    x = torch.randn(4, 3, 5)
    graph = training_graph(model, _loss, torch.optim.SGD(model.parameters(), lr=0.1), x)
    assert _kernels(graph) == layers
    run = compile_eager(graph)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for _ in range(5):
        loss = run([t.detach() for t in graph.initial.values()], [x])[0]
        expected = reference(x)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-7)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "module in bfloat16"])
@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "written out"])
def test_bfloat16_follows_eager(whole: bool, kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel and not lstm._has_bfloat16():
        pytest.skip("this processor's kernel does not compute in bfloat16")
    monkeypatch.setattr(lstm, "_has_bfloat16", lambda: kernel)
    torch.manual_seed(0)
    model = Last(bidirectional=True).to(torch.bfloat16 if whole else torch.float32)
    reference = copy.deepcopy(model)
    x = torch.randn(4, 3, 5, dtype=torch.bfloat16 if whole else torch.float32)
    precision = "float32" if whole else "bfloat16"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    graph = training_graph(model, _loss, optimizer, x, precision=precision)
    assert _kernels(graph) == (4 if kernel else 0)
    for node in graph.nodes:
        assert str(node.target) != KERNEL or node.meta["val"][0].dtype == torch.bfloat16
    run = compile_eager(graph)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for _ in range(5):
        loss = run([t.detach() for t in graph.initial.values()], [x])[0]
        # Where its kernel does not compute in bfloat16, eager PyTorch calls it all the same under autocast, and fails.
        with torch.autocast("cpu", torch.bfloat16, enabled=not whole), torch.backends.mkldnn.flags(enabled=kernel):
            expected = reference(x)
            optimizer.zero_grad()
            expected.backward()
        optimizer.step()
        assert loss.dtype == expected.dtype
        torch.testing.assert_close(loss, expected.detach(), rtol=0.02, atol=0.01)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02)


def test_dropout_between_layers_is_the_steps_own() -> None:
    torch.manual_seed(0)
    model = Last(dropout=0.5)
    x = torch.randn(4, 3, 5)
    graph = training_graph(model, _loss, torch.optim.SGD(model.parameters(), lr=0.0), x)
    run = compile_eager(graph)
    variables = [t.detach() for t in graph.initial.values()]
    first, second = (run(variables, [x])[0] for _ in range(2))
    assert first != second
    assert sum(str(node.target) == "millrace.uniform.default" for node in graph.nodes) == 1


@pytest.mark.parametrize(
    "model",
    [Last().double(), Last(bias=False), Last(proj_size=3)],
    ids=["float64", "no bias", "projection"],
)
def test_what_the_kernel_cannot_do_is_written_out(model: nn.Module) -> None:
    x = torch.randn(4, 3, 5, dtype=next(model.parameters()).dtype)
    graph = training_graph(model, _loss, torch.optim.SGD(model.parameters(), lr=0.1), x)
    assert _kernels(graph) == 0
    loss = compile_eager(graph)([t.detach().clone() for t in graph.initial.values()], [x])[0]
    torch.testing.assert_close(loss, model(x).detach())


def test_packed_sequences_are_refused_with_a_way_out() -> None:
    model = nn.LSTM(5, 6)

    def loss(m: Any, batch: Tensor) -> Tensor:
        return m(pack_padded_sequence(batch, [4, 3, 1]))[1][0].mean()

    with pytest.raises(TraceError, match=r"(?s)test_lstm\.py:\d+ in loss: .*mask"):
        training_graph(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(4, 3, 5))


@pytest.mark.parametrize("reverse", [False, True])
def test_where_the_kernel_is_not_another_one_computes_the_same(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, h, c = torch.randn(5, 3, 4), torch.randn(3, 6), torch.randn(3, 6)
    weights = [torch.randn(24, 4), torch.randn(24, 6), torch.randn(24), torch.randn(24)]
    given = [torch.randn(5, 3, 6), torch.randn(3, 6), torch.randn(3, 6)]

    def results() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        with torch.no_grad():  # as steps run
            made = list(torch.ops.millrace.lstm_layer(x, *weights, h, c, reverse))
            backward = torch.ops.millrace.lstm_layer_backward(x, weights, h, c, made, given, reverse)
        return made, list(backward)

    (made, gradients) = results()
    lstm._workspace_bytes(5, 3, 4, 6, torch.float32)  # asks the kernel itself, once
    monkeypatch.setattr(lstm, "_has_kernel", lambda x: False)
    (elsewhere, gradients_elsewhere) = results()
    torch.testing.assert_close(elsewhere[:3], made[:3], rtol=1e-4, atol=1e-5)
    assert elsewhere[3].shape == made[3].shape
    torch.testing.assert_close(gradients_elsewhere, gradients, rtol=1e-4, atol=1e-4)
    assert not any(tensor.requires_grad for tensor in (*elsewhere, *gradients_elsewhere))
    places = [tensor.untyped_storage().data_ptr() for tensor in (*elsewhere[:3], *gradients_elsewhere)]
    assert len(set(places)) == len(places), "a node's results may not share memory"
