"""The eager tier: run the graph's operators one after the other, as they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from millrace.compile.in_place import in_place
from millrace.graph.graph import Graph

# (variables in the signature's order, feeds in the signature's order) -> fetches; updates are assigned in place
Compiled = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]


def compile_eager(graph: Graph, writable: Collection[str] = ()) -> Compiled:
    """A callable that runs `graph` with PyTorch's own kernels. Takes milliseconds to make.

    Args: writable: feeds whose memory it may use for its results.
    """
    module = in_place(graph, writable)
    forward = module.forward

    @torch.no_grad()
    def run(variables: Sequence[Tensor], feeds: Sequence[Tensor]) -> list[Tensor]:
        return list(forward(*variables, *feeds))

    return run
