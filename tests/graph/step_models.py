"""Whole training steps of many kinds, for passes that cut a step and must not change what it computes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import millrace
from millrace.graph.graph import Graph
from millrace.graph.training import training_graph

SIZE = 6  # examples of a batch
WORDS = 11


class Words(nn.Module):
    """Embedded tokens [batch, 4] through a layer, the sum of their values into scores."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(WORDS, 8), layer, nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        found = self.layer(self.table(tokens))
        return self.head((found[0] if isinstance(found, tuple) else found).mean(1))


class Tied(nn.Module):
    """The table that reads tokens also scores them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return (torch.tanh(self.table(tokens)).mean(1) @ self.table.weight.t())[:, :3]


def _images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(16, 3)
    )


MODELS: Mapping[str, tuple[Callable[[], nn.Module], str]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), "numbers"),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)), "numbers"),
    "cnn": (_images, "images"),
    "embedding": (lambda: Words(nn.Tanh()), "words"),
    "tied": (Tied, "words"),
    "lstm": (lambda: Words(nn.LSTM(8, 8, batch_first=True)), "words"),
    "transformer": (lambda: Words(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)), "words"),
    "transformer with dropout": (lambda: Words(nn.TransformerEncoderLayer(8, 2, 16, 0.2, batch_first=True)), "words"),
}

OPTIMIZERS: Mapping[str, Callable[[nn.Module], Any]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.1),
    "groups": lambda m: torch.optim.Adam(
        [{"params": [p], "lr": 0.01 * i} for i, p in enumerate(m.parameters(), 1)], betas=(0.8, 0.9)
    ),
    "millrace adam clipped": lambda _: millrace.optim.adam(0.01, clip_norm=0.1),
    "millrace momentum accumulated": lambda _: millrace.optim.momentum(0.1, accumulate=2),
    "millrace adagrad": lambda _: millrace.optim.adagrad(0.1),
    "millrace sgd": lambda _: millrace.optim.sgd(0.1),
}


def loss(model: nn.Module, batch: Any) -> Any:
    scores = model(batch[0])
    return F.cross_entropy(scores, batch[1]), {"hits": (scores.argmax(-1) == batch[1]).sum()}


def batch_of(kind: str, size: int = SIZE, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (size,), generator=generator)
    if kind == "words":
        return torch.randint(0, WORDS, (size, 4), generator=generator), labels
    shape = (size, 4) if kind == "numbers" else (size, 1, 4, 4)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype), labels


@functools.cache
def step_graph(model: str, optimizer: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Graph:
    """The training step of one of the MODELS under one of the OPTIMIZERS; settings are those of `training_graph`."""
    torch.manual_seed(0)
    make, kind = MODELS[model]
    net = make().to(dtype)
    return training_graph(net, loss, OPTIMIZERS[optimizer](net), batch_of(kind, dtype=dtype), seed=3, **settings)
