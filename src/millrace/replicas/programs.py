"""What workers compute, traced for every shape of slice that comes, as it is sent to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from millrace.errors import WorkerError
from millrace.graph.graph import Graph
from millrace.graph.passes.halves import halves
from millrace.graph.save import graph_bytes
from millrace.runtime.feeds import FeedReader, Key


class Programs:
    """Programs by number: the half of the step that makes gradients, or the whole of it.

    graph: of the whole step. reader: of its batches.
    """

    def __init__(self, graph: Graph, reader: FeedReader, *, whole: bool = False) -> None:
        self._graph, self._reader, self._whole = graph, reader, whole
        self._keys: dict[Key, int] = {}  # by the shape of a slice
        self._contents: dict[int, Tensor] = {}

    def of(self, feeds: Sequence[Tensor]) -> tuple[int, dict[str, Tensor]]:
        """The number of the program for a slice of this shape, and the slice's feeds by name.

        Raises: WorkerError for a new shape where the graph cannot be traced again; SettingError as `halves`.
        """
        key: Key = tuple((tuple(feed.shape), feed.dtype) for feed in feeds)
        if key not in self._keys:
            graph = self._graph
            if tuple((f.spec.shape, f.spec.dtype) for f in graph.feeds) != key:
                if graph.retrace is None:
                    raise WorkerError("a graph that was loaded from a file cannot be traced for slices of its batch")
                graph = graph.retrace(self._reader.nest(self._reader.read(tuple(feeds))))
            number = len(self._keys)
            self._contents[number] = as_tensor(graph_bytes(graph if self._whole else halves(graph).gradients))
            self._keys[key] = number
        return self._keys[key], {f.name: feed for f, feed in zip(self._graph.feeds, feeds, strict=True)}

    def content(self, number: int) -> Tensor:
        """A program as it travels."""
        return self._contents[number]


def as_tensor(content: bytes) -> Tensor:
    """Bytes, to travel beside a message."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def as_bytes(tensor: Tensor) -> bytes:
    """The reverse of `as_tensor`."""
    return tensor.numpy().tobytes()
