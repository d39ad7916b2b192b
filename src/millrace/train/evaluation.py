"""Evaluation and prediction: one pass over data in evaluation mode, without gradients, as graphs of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from millrace.compile.tiered import Say
from millrace.graph.training import evaluation_graph
from millrace.runtime.session import Session
from millrace.train.metrics import RunningMeans


class Evaluator:
    """Computes `compute(model, batch)` on batches, with the model's current weights.

    The first batch traces the graph. Batches of other sizes, such as the last one, or nested otherwise, trace others.
    """

    def __init__(
        self,
        model: nn.Module,
        compute: Callable[[Any, Any], Any],
        *,
        precision: str = "float32",
        compile: str = "tiered",
        say: Say = lambda _: None,
    ) -> None:
        self._model = model
        self._compute = compute
        self._precision = precision
        self._compile = compile
        self._say = say
        self._sessions: dict[str, Session] = {}  # by how the batches nest

    def means(self, batches: Iterable[Any]) -> dict[str, float]:
        """Loss and metrics over all batches, each batch weighted by its number of examples."""
        means = RunningMeans()
        for batch in batches:
            means.update(self(batch), weight=examples_in(batch))
        return means.read()

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """The results for one batch, by fetch name."""
        nest = repr(pytree.tree_structure(batch))  # arrays give tuples, a DataLoader gives lists
        if nest not in self._sessions:
            graph = evaluation_graph(self._model, self._compute, batch, precision=self._precision)
            self._sessions[nest] = Session(graph, compile=self._compile, say=self._say, warn_new_shape=False)
        session = self._sessions[nest]
        names = list(session.graph.fetches)
        return dict(zip(names, session.run(names, batch), strict=True))


def examples_in(batch: Any) -> int:
    """The length of the first tensor of a batch; 1 when it has no axis."""
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    return int(leaves[0].shape[0]) if leaves and leaves[0].ndim else 1


def only(results: Mapping[str, Tensor]) -> Any:
    """The single value when a prediction has just one, otherwise all of them by name."""
    return next(iter(results.values())) if len(results) == 1 else dict(results)
