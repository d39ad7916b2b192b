"""How feeds lie in memory: as the first batch did, because the graph's views and the machine code rest on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from millrace.graph.graph import Graph

Stride = tuple[int, ...]


def _stride_of(fake: Tensor) -> Stride:
    """The stride of an input's stand-in; a contiguous one for an expanded tensor, whose own could not be filled."""
    if any(stride == 0 and extent > 1 for extent, stride in zip(fake.shape, fake.stride(), strict=True)):
        return torch.empty(fake.shape, device="meta").stride()
    return fake.stride()


def feed_strides(graph: Graph) -> list[Stride]:
    """The stride of every feed of `graph`, in order."""
    placeholders = list(graph.placeholders().values())[len(graph.variables) :]
    return [_stride_of(node.meta["val"]) for node in placeholders]


def laid_out(feeds: Sequence[Tensor], strides: Sequence[Stride]) -> list[Tensor]:
    """The feeds in those strides; a feed that is so already is returned itself."""
    return [
        feed if feed.stride() == stride else _copied(feed, stride) for feed, stride in zip(feeds, strides, strict=True)
    ]


def _copied(feed: Tensor, stride: Stride) -> Tensor:
    return torch.empty_strided(feed.shape, stride, dtype=feed.dtype, device=feed.device).copy_(feed)
