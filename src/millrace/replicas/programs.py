"""What workers compute, traced for every shape of slice that comes, as it is sent to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from millrace.errors import FeedError, MillraceError, WorkerError
from millrace.graph.graph import Graph
from millrace.graph.passes.fetched_rows import fetched_rows
from millrace.graph.passes.halves import halves
from millrace.graph.save import graph_bytes
from millrace.runtime.feeds import FeedReader, Key

INDICES = "indices"  # names a graph beside a message


class Programs:
    """Programs by number: the half of the step that makes gradients, or the whole of it.

    graph: of the whole step. reader: of its batches. tables: those of which a worker has some rows only.
    """

    def __init__(self, graph: Graph, reader: FeedReader, *, whole: bool = False, tables: Sequence[str] = ()) -> None:
        self._graph, self._reader, self._whole, self._tables = graph, reader, whole, tables
        self._keys: dict[Key, int] = {}  # by the shape of a slice
        self._contents: dict[int, Tensor] = {}
        self._indices: dict[int, Tensor] = {}

    def of(self, feeds: Sequence[Tensor]) -> tuple[int, dict[str, Tensor]]:
        """The number of the program for a slice of this shape, and the slice's feeds by name.

        Raises: WorkerError for a new shape where the graph cannot be traced again; FeedError where the step does not
            run on it; SettingError as `halves`.
        """
        key: Key = tuple((tuple(feed.shape), feed.dtype) for feed in feeds)
        if key not in self._keys:
            graph = self._graph
            if tuple((f.spec.shape, f.spec.dtype) for f in graph.feeds) != key:
                if graph.retrace is None:
                    raise WorkerError("a graph that was loaded from a file cannot be traced for slices of its batch")
                graph = self._traced(graph.retrace, feeds)
            number = len(self._keys)
            self._contents[number] = as_tensor(graph_bytes(self._made(graph, number)))
            self._keys[key] = number
        return self._keys[key], {f.name: feed for f, feed in zip(self._graph.feeds, feeds, strict=True)}

    def _traced(self, retrace: Callable[[Any], Graph], feeds: Sequence[Tensor]) -> Graph:
        try:
            return retrace(self._reader.nest(self._reader.read(tuple(feeds))))
        except (MillraceError, RuntimeError, ValueError, IndexError, TypeError) as error:
            shapes = ", ".join(f"{feed.dtype} {list(feed.shape)}" for feed in feeds)
            notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
            raise FeedError(
                f"the step does not run on a batch, or a slice of one, of {shapes}: {error}{notes}"
            ) from error

    def _made(self, graph: Graph, number: int) -> Graph:
        if self._whole:
            return graph
        cut = halves(graph)
        if not self._tables:
            return cut.gradients
        found = fetched_rows(cut, self._tables)
        self._indices[number] = as_tensor(graph_bytes(found.indices))
        return found.gradients

    def content(self, number: int) -> Tensor:
        """A program as it travels."""
        return self._contents[number]

    def indices(self, number: int) -> dict[str, Tensor]:
        """What travels with it where there are tables: the graph that says which rows a slice names."""
        return {INDICES: self._indices[number]} if number in self._indices else {}


def as_tensor(content: bytes) -> Tensor:
    """Bytes, to travel beside a message."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def as_bytes(tensor: Tensor) -> bytes:
    """The reverse of `as_tensor`."""
    return tensor.numpy().tobytes()
