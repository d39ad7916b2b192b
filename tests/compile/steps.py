"""The small compiled step that the tests of this room share: one compilation for all of them, then the cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tests.small import dropout_mlp, labelled, with_accuracy
from torch import Tensor

from millrace.compile.eager import Compiled
from millrace.compile.tiered import Runner
from millrace.graph.graph import Graph
from millrace.graph.passes.prune import prune
from millrace.graph.training import training_graph

BATCH = labelled(dtype=torch.float32)


@functools.cache
def step_graph(seed: int = 0) -> Graph:
    """A training step with dropout, AdamW, a metric that counts and a constant mask with infinities.

    Graphs are not to be changed, and every seed gives the same computation: one compiled artifact serves all.
    """
    model = dropout_mlp(torch.float32, seed)
    model.register_buffer("mask", torch.tensor([0.0, 0.0, -torch.inf]))

    def loss(model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        result, metrics = with_accuracy(model, batch)
        return result, {**metrics, "visible": model.mask.exp().sum()}

    whole = training_graph(model, loss, torch.optim.AdamW(model.parameters(), lr=0.01), BATCH)
    return prune(whole, ["loss", "accuracy", "visible"], whole.updates)


def fresh(graph: Graph) -> list[Tensor]:
    """The variables at the start, as tensors of one's own."""
    return [graph.initial[v.name].detach().clone() for v in graph.variables]


def run_steps(run: Compiled | Runner, variables: Sequence[Tensor], count: int) -> list[float]:
    """The losses of `count` steps."""
    return [float(run(variables, list(labelled(dtype=torch.float32, seed=n)))[0]) for n in range(count)]


def close(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.allclose(x, y, rtol=1e-3, atol=1e-5) for x, y in zip(a, b, strict=True))


def nothing_compiles(*_: object, **__: object) -> Any:
    """In the place of the compiler, where everything must come from the cache."""
    raise AssertionError("something was compiled")


class Said(list[str]):
    """What a runner says."""

    @property
    def only(self) -> str:
        """The one line that was said."""
        assert len(self) == 1, self
        assert "\n" not in self[0]
        return self[0]


def broken(graph: Graph, spoil: Callable[[Sequence[Tensor], list[Tensor]], None], run: Compiled) -> Compiled:
    """A compiled callable that does `spoil(variables, fetches)` after the step."""

    def spoiled(variables: Sequence[Tensor], feeds: Sequence[Tensor]) -> list[Tensor]:
        fetched = run(variables, feeds)
        spoil(variables, fetched)
        return fetched

    return spoiled
