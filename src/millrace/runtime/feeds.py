"""From a batch to the tensors that a graph takes: flat, in the order of its feeds, on their devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from millrace.errors import FeedError, TraceError
from millrace.graph.graph import Graph
from millrace.graph.trace import flatten_feed
from millrace.runtime.aliasing import Memory

Key = tuple[tuple[tuple[int, ...], torch.dtype], ...]  # what of a batch decides which graph it needs


class Batch(NamedTuple):
    """A batch, flat. `given`: the user's own tensors, wherever they are; `placed`: where the graph wants them."""

    given: list[Tensor]
    placed: list[Tensor]

    @property
    def key(self) -> Key:
        """The shapes and dtypes, in order."""
        return tuple([(t.shape, t.dtype) for t in self.placed])


class FeedReader:
    """Reads batches for one graph.

    memory: where its variables lie. A batch that is a variable, or a part of one, would change while the step runs, so
    it is copied.
    """

    def __init__(self, graph: Graph, memory: Memory) -> None:
        self._feeds = graph.feeds
        self._tree = pytree.treespec_loads(graph.feed_tree)
        self._devices = [torch.device(feed.spec.device) for feed in graph.feeds]
        self._is_tuple = self._tree == pytree.tree_structure(tuple(range(len(graph.feeds))))
        self._memory = memory

    def read(self, batch: Any) -> Batch:
        """Flatten a batch that nests like the traced one, or has the same names.

        Raises: FeedError for other names, and for what is no tensor.
        """
        if type(batch) is tuple and self._is_tuple and len(batch) == len(self._feeds):
            leaves = list(batch)  # the usual batch; this is done in every step
        else:
            leaves, tree = pytree.tree_flatten(batch)
            if tree != self._tree:
                leaves = self._by_name(batch)
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                leaves = self._by_name(batch)
                break
        placed = []
        for leaf, device in zip(leaves, self._devices, strict=True):
            on_device = leaf if leaf.device == device else leaf.to(device, non_blocking=True)
            placed.append(on_device.clone() if self._memory.holds(on_device) else on_device)
        return Batch(leaves, placed)

    def nest(self, batch: Batch) -> Any:
        """The batch as the step takes it."""
        return pytree.tree_unflatten(batch.placed, self._tree)

    def empty(self) -> Batch:
        """Tensors without meaning, for fetches that read no feed: inputs that nothing reads still have their places."""
        tensors = [torch.empty(f.spec.shape, dtype=f.spec.dtype, device=f.spec.device) for f in self._feeds]
        return Batch([], tensors)

    def _by_name(self, batch: Any) -> list[Tensor]:
        """A list where a tuple was traced, or a dict in another order, has the same names."""
        try:
            named, _ = flatten_feed(batch)
        except TraceError as error:
            raise FeedError(str(error)) from error
        if named.keys() != {feed.name for feed in self._feeds}:
            self._refuse(named)
        return [named[feed.name] for feed in self._feeds]

    def _refuse(self, named: Mapping[str, Tensor]) -> NoReturn:
        expected = ", ".join(feed.name for feed in self._feeds)
        raise FeedError(f"the batch nests as {{{', '.join(named)}}}, but the graph was traced with {{{expected}}}")
