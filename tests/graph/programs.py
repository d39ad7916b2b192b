"""What the tests of printing, saving, drawing and passes share: small graphs, random programs, and running them.

Graphs are not to be changed, so one of each serves all tests of a process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from millrace.compile.eager import compile_eager
from millrace.graph.graph import Graph, copy_fx, step_module
from millrace.graph.trace import trace

SIZE = 4  # every value of a random program is float64[SIZE, SIZE]


@functools.cache
def mlp_graph(hidden: int = 3, rate: float = 0.5) -> Graph:
    """A whole training step: two linear layers, mean squared error, SGD."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)

    def step(_: Mapping[str, Any], batch: Any) -> dict[str, Tensor]:
        loss = (model(batch["x"]) - batch["y"]).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss}

    feed = {"x": torch.randn(5, 4), "y": torch.randn(5, 2)}
    return trace(step, {"": model, "optimizer": optimizer}, feed)


@functools.cache
def deep_graph(layers: int = 3) -> Graph:
    """Named modules inside modules, dropout, residual sums, AdamW: what a picture has to cope with."""
    torch.manual_seed(0)
    model = _Deep(layers)
    optimizer = torch.optim.AdamW(model.parameters())

    def step(_: Mapping[str, Any], batch: Any) -> dict[str, Tensor]:
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss}

    return trace(step, {"": model, "optimizer": optimizer}, (torch.randn(6, 8), torch.randint(0, 5, (6,))))


class _Deep(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Dropout(0.1), nn.GELU()) for _ in range(layers)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@functools.cache
def branch_graph(offset: float = 1.0) -> Graph:
    """A branch in the graph, its gradient, a constant, and a variable updated by hand."""
    offsets = torch.tensor([offset, 2.0, 3.0])

    def step(v: dict[str, Any], batch: Tensor) -> dict[str, Tensor]:
        w = v["w"]
        result = torch.cond(batch.sum() > 0, lambda x, w: torch.sin(x * w) + offsets, lambda x, w: x - w, (batch, w))
        loss = result.pow(2).sum()
        v["w"] = w - 0.5 * torch.autograd.grad(loss, w)[0]
        return {"loss": loss}

    return trace(step, {"w": torch.tensor([0.5, -1.0, 2.0], requires_grad=True)}, torch.randn(2, 3))


def copy_module(module: GraphModule) -> tuple[GraphModule, dict[Node, Node]]:
    """A copy of a graph module whose nodes may be changed, and the map from old to new nodes."""
    fx, mapping = copy_fx(module)
    return step_module(module, fx), mapping


def feeds_of(graph: Graph, seed: int = 1) -> list[Tensor]:
    """Random feeds of the right shapes."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    for feed in graph.feeds:
        floating = feed.spec.dtype.is_floating_point
        value = torch.randn(feed.spec.shape, generator=generator, dtype=torch.float64) if floating else None
        found.append(
            torch.zeros(feed.spec.shape, dtype=feed.spec.dtype) if value is None else value.to(feed.spec.dtype)
        )
    return found


def run(graph: Graph, initial: Mapping[str, Tensor], feeds: Sequence[Tensor], steps: int = 2) -> list[Tensor]:
    """The fetches of every step and the variables after the last one, in the eager tier."""
    variables = [initial[v.name].detach().clone() for v in graph.variables]
    compiled, fetched = compile_eager(graph), list[Tensor]()
    for _ in range(steps):
        fetched += [value.clone() for value in compiled(variables, list(feeds))]
    return fetched + variables


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor's elements, row by row."""
    plain = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def equal_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors agree in shape, dtype and every bit (so that NaN equals NaN)."""
    return len(a) == len(b) and all(
        (x.dtype, x.shape, bits(x)) == (y.dtype, y.shape, bits(y)) for x, y in zip(a, b, strict=True)
    )


@dataclass(frozen=True)
class Program:
    """A random step: operators applied to earlier values, the last value summed to a loss, two weights updated."""

    operators: tuple[tuple[str, int, int], ...]
    first: int
    second: int

    def graph(self) -> Graph:
        torch.manual_seed(0)
        tensors = {name: torch.randn(SIZE, SIZE, dtype=torch.float64, requires_grad=True) for name in ("a", "b")}
        return trace(self.step, tensors, torch.randn(SIZE, SIZE, dtype=torch.float64))

    def values(self, a: Tensor, b: Tensor, x: Tensor) -> list[Tensor]:
        found = [a, b, x]
        for name, left, right in self.operators:
            found.append(OPERATORS[name](found[left % len(found)], found[right % len(found)]))
        return found

    def step(self, v: dict[str, Any], x: Tensor) -> dict[str, Tensor]:
        values = self.values(v["a"], v["b"], x)
        picked = values[self.first % len(values)] * values[self.second % len(values)]
        loss = (picked + 0.1 * (v["a"] + v["b"])).tanh().sum()
        gradients = torch.autograd.grad(loss, [v["a"], v["b"]])
        with torch.no_grad():
            v["a"], v["b"] = v["a"] - 0.1 * gradients[0], v["b"] - 0.1 * gradients[1]
        return {"loss": loss, "last": values[-1], "picked": picked}


OPERATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: x + y,
    "multiply": lambda x, y: x * y,
    "matmul": lambda x, y: x @ y / SIZE,
    "linear": lambda x, y: nn.functional.linear(x, y) / SIZE,
    "transpose": lambda x, _: x.t(),
    "transpose twice": lambda x, _: x.t().t(),
    "flatten": lambda x, _: x.reshape(-1).view(SIZE, SIZE),
    "relu": lambda x, _: x.relu(),
    "tanh": lambda x, _: x.tanh(),
    "softmax": lambda x, _: x.softmax(-1),
    "rows": lambda x, y: x.sum(0, keepdim=True).expand(SIZE, SIZE) - y,
    "column": lambda x, y: torch.cat([x[:, :1], y[:, 1:]], 1),
    "split": lambda x, _: torch.stack([part.sum(0) for part in x.split(1)]),
    "same again": lambda x, y: x * y + x * y,
    "half": lambda x, _: x * 0.5,
    "half as tensor": lambda x, _: x * torch.full_like(x, 0.5),
}

programs = st.builds(
    Program,
    st.lists(
        st.tuples(st.sampled_from(sorted(OPERATORS)), st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=8
    ).map(tuple),
    st.integers(0, 20),
    st.integers(0, 20),
)
