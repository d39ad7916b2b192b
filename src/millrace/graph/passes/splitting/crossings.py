"""How much blocks need of each other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from millrace.graph.graph import Graph, info

aten = torch.ops.aten


def crossing_bytes(graph: Graph) -> int:
    """Bytes that one step of a split graph hands from block to block, or between a block and what is of no block.

    Each value counts once for every block that reads it. What blocks read of feeds and variables is left out.
    """
    total = 0
    for node in graph.nodes:
        readers: dict[int | None, int] = {}
        for user in node.users:
            if user.op == "call_function":
                block = info(user).block
                readers[block] = max(readers.get(block, 0), _bytes_read(user, node))
        total += sum(size for block, size in readers.items() if block != info(node).block)
    return total


def _bytes_read(user: Node, node: Node) -> int:
    """What `user` reads of the value of `node`: of a slice, only the slice moves."""
    value = (user if user.target is aten.slice.Tensor else node).meta.get("val")
    return value.numel() * value.dtype.itemsize if isinstance(value, Tensor) else 0
