"""The graph in chunks of time while it is made: a value may be in blocks along time, block k for chunk k."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.fx import Node

from millrace.graph.graph import INFO, NodeInfo
from millrace.graph.passes.splitting.builder import Builder
from millrace.graph.signature import Phase

aten = torch.ops.aten

CHUNK = "chunk"  # the key in Node.meta of the chunk of time that a node works at, 0 for the earliest


class ChunkBuilder(Builder):
    """Makes nodes of the graph in chunks.

    layers: what each `lstm_layer` node that was cut has become, in the order of chunks. steps: the chunk of nodes that
    stand once for every step of time.
    """

    word = "chunk"

    def __init__(self, parts: int, mode: Any, steps: Mapping[Node, int]) -> None:
        super().__init__(parts, mode, {}, lambda owner, _: owner)
        self.layers: dict[Node, tuple[Node, ...]] = {}
        self.steps = steps
        self._picked: dict[tuple[Node, int], Node] = {}

    def copy(self, node: Node) -> Node:
        """`node` as it is, in the chunk of its step of time."""
        new = super().copy(node)
        if node in self.steps:
            new.meta[CHUNK] = self.steps[node]
        return new

    def total(self, blocks: Iterable[Node], target: Any = aten.add.Tensor) -> Node:
        """Put together in the order in which the chunks are computed, each as soon as it is there."""
        numbered = list(enumerate(blocks))
        if self._info.phase is Phase.BACKWARD:
            numbered.reverse()
        (_, total), *rest = numbered
        for chunk, block in rest:
            total = self.call(target, (total, block), block=chunk)
        return total

    def pick(self, node: Node, index: int, chunk: int) -> Node:
        """One of the results of an operator with several; only once for each."""
        if (node, index) not in self._picked:
            self._picked[node, index] = self.call(operator.getitem, (node, index), block=chunk)
        return self._picked[node, index]

    def _origin(self, whole: NodeInfo, block: int | None) -> dict[str, Any]:
        return {INFO: whole} if block is None else {INFO: whole, CHUNK: block}
