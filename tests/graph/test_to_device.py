"""A graph for another device makes and reads nothing elsewhere: run on tensors that have a device, but no values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from millrace.compile.eager import compile_eager
from millrace.graph.check import check
from millrace.graph.control import cond, scan
from millrace.graph.graph import Graph, info
from millrace.graph.passes.to_device import to_device
from millrace.graph.training import training_graph

META, CUDA = torch.device("meta"), torch.device("cuda:0")


class Only(TorchDispatchMode):
    """Lets no operator read or make a tensor that is not on one device."""

    supports_higher_order_operators = True  # inside branches, fake tensors refuse to be mixed

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves((args, kwargs, found)):
            if isinstance(tensor, Tensor):
                assert tensor.device == self.device, f"{func} has {tensor.device}"
        return found


class Attention(nn.Module):
    """Tokens [B, T] -> scores [B, T, 11]; with a mask, causal or neither."""

    def __init__(self, kind: str = "causal", dropout: float = 0.0) -> None:
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(11, 8)
        self.out = nn.Linear(8, 11)
        self.drop = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        mask = None
        if self.kind == "float mask":
            mask = torch.arange(6.0, dtype=x.dtype).expand(6, 6) - 3
        if self.kind == "bool mask":
            mask = torch.ones(6, 6, dtype=torch.bool).tril(-1)  # the first query sees nothing
        y = F.scaled_dot_product_attention(heads, heads * 0.5, heads + 1, mask, is_causal=self.kind == "causal")
        return self.out(self.drop(y.transpose(1, 2).flatten(2)))


class Odds(nn.Module):
    """What names devices and makes tensors: ranges, constants, copies to a device, a branch, a loop, BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.line = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(torch.relu(self.norm(self.conv(x))), 2).mean((2, 3)).to("cpu", torch.float64).float()
        y = y + torch.arange(4) * torch.tensor([1.0, 2.0, 3.0, 4.0]) + torch.zeros(4, device="cpu")
        y = cond(y.sum() > 0, lambda v: v * torch.tensor([2.0]), lambda v: v + torch.ones(4), (y,))
        _, sums = scan(lambda total, v: (total + v, total * 2), torch.zeros(4), y)
        return self.line(F.dropout(y + sums[-1] + torch.rand(4) + torch.randn_like(y), 0.3))


class Recurrent(nn.Module):
    """A layer that is one node on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.out = nn.Embedding(11, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.lstm(self.embed(tokens))[0])


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    scores = model(batch[0])
    return F.cross_entropy(scores.flatten(0, -2), batch[1].flatten())


def graph_of(model: nn.Module, batch: Any, optimizer: Callable[..., Any] = torch.optim.AdamW, **more: Any) -> Graph:
    return training_graph(model, cross_entropy, optimizer(model.parameters(), lr=0.1), batch, **more)


def tokens() -> tuple[Tensor, Tensor]:
    return torch.arange(12).view(2, 6) % 11, torch.arange(1, 13).view(2, 6) % 11


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1)
    return nn.Sequential(nn.Embedding(11, 8), layer, nn.Linear(8, 11))


GRAPHS: dict[str, Callable[[], Graph]] = {
    "attention": lambda: graph_of(Attention(dropout=0.2), tokens(), torch.optim.SGD),
    "masked": lambda: graph_of(Attention("float mask"), tokens()),
    "transformer": lambda: graph_of(transformer(), tokens()),
    "bfloat16": lambda: graph_of(transformer(), tokens(), precision="bfloat16"),
    "recurrent": lambda: graph_of(Recurrent(), tokens(), torch.optim.SGD),
    "odds": lambda: graph_of(Odds(), (torch.randn(6, 1, 8, 8), torch.arange(6) % 3)),
}


@pytest.mark.parametrize("device", [META, CUDA], ids=str)
@pytest.mark.parametrize("name", GRAPHS)
def test_nothing_is_made_or_read_elsewhere(name: str, device: torch.device) -> None:
    torch.manual_seed(0)
    graph = GRAPHS[name]()
    # Fake tensors stand in for those of a device that is not there; a real meta tensor is its own stand-in.
    with FakeTensorMode(allow_non_fake_inputs=True):
        moved = check(to_device(graph, device))
        assert {spec.device for spec in [*(v.spec for v in moved.variables), *(f.spec for f in moved.feeds)]} == {
            str(device)
        }
        made = [torch.empty(v.spec.shape, dtype=v.spec.dtype, device=device) for v in moved.variables]
        fed = [torch.empty(f.spec.shape, dtype=f.spec.dtype, device=device) for f in moved.feeds]
        run = compile_eager(moved)
        with Only(device):
            fetched = run(made, fed)
    for value, node in zip(fetched, graph.fetches.values(), strict=True):
        assert value.shape == graph.node(node).meta["val"].shape
    assert all(n.meta["val"].device == device for n in moved.nodes if isinstance(n.meta["val"], Tensor))


@pytest.mark.parametrize("name", GRAPHS)
def test_on_the_same_device_it_computes_the_same(name: str) -> None:
    torch.manual_seed(0)
    graph = GRAPHS[name]()
    moved = check(to_device(graph, torch.device("cpu")))
    feeds = [t.to(f.spec.dtype) for t, f in zip(_batch(graph), graph.feeds, strict=True)]
    results = []
    for each in (graph, moved):
        variables = [graph.initial[v.name].detach().clone() for v in graph.variables]
        results.append([compile_eager(each)(variables, feeds), variables])
    # AdamW's first update is a sign, which turns a rounding of a tiny gradient into a step of the learning rate.
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2e-2 if name == "bfloat16" else 1e-4, atol=1e-6)
    if name in ("attention", "recurrent", "odds"):
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)


def _batch(graph: Graph) -> list[Tensor]:
    return list(tokens()) if len(graph.feeds[0].spec.shape) == 2 else [torch.randn(6, 1, 8, 8), torch.arange(6) % 3]


@pytest.mark.parametrize("kind", ["causal", "float mask", "bool mask", "none"])
def test_attention_written_out_is_the_kernel(kind: str) -> None:
    torch.manual_seed(0)
    model = Attention(kind).double()
    graph = graph_of(model, tokens(), torch.optim.SGD)
    flash = [n for n in graph.nodes if "flash_attention_for_cpu" in str(n.target)]
    assert len(flash) == 2, "the trace has no attention kernels: nothing was tested"
    written = check(to_device(graph, torch.device("cpu")))
    assert not any("flash" in str(n.target) for n in written.nodes)
    origins = {info(node) for node in flash}  # of the forward pass, and of the backward pass
    assert {info(node) for node in written.nodes if node.target is torch.ops.aten.exp.default} >= origins
    results = []
    for each in (graph, written):
        variables = [graph.initial[v.name].detach().clone() for v in graph.variables]
        results.append([compile_eager(each)(variables, list(tokens())), variables])
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)
