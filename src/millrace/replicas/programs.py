"""What workers compute, traced for every shape of slice that comes, as it is sent to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from millrace.errors import FeedError, MillraceError, SettingError, WorkerError
from millrace.graph.graph import Graph
from millrace.graph.passes.fetched_rows import fetched_rows
from millrace.graph.passes.halves import Halves, halves
from millrace.graph.passes.microbatch import microbatch
from millrace.graph.save import graph_bytes
from millrace.replicas.mean_loss import check_mean
from millrace.runtime.feeds import Batch, FeedReader, Key
from millrace.runtime.ranges import Range, check_ranges, feed_ranges

INDICES, PIECES = "indices", "pieces"  # name what is beside a program


class Programs:
    """Programs by number: the half of the step that makes gradients, or the whole of it.

    graph: of the whole step. reader: of its batches. tables: those of which a worker has some rows only. microbatches:
    into how many parts each slice is divided; one that cannot be divided so is divided into as many as can be. placed:
    the pieces of a program for the devices of a replica. variables: those of the step, where slices are parts of a
    batch: with them it is seen whether the loss is a mean.
    """

    def __init__(
        self,
        graph: Graph,
        reader: FeedReader,
        *,
        whole: bool = False,
        tables: Sequence[str] = (),
        microbatches: int = 1,
        placed: Callable[[Graph], bytes] | None = None,
        variables: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._graph, self._reader, self._whole, self._tables = graph, reader, whole, tables
        self._microbatches, self._placed = microbatches, placed
        self._variables = variables  # until it is seen
        self._exchanged = None if whole or microbatches == 1 else halves(graph).exchanged
        self._parts: dict[
            int, tuple[int, tuple[str, ...]]
        ] = {}  # of each program: how many, and the names of its feeds
        self._keys: dict[Key, int] = {}  # by the shape of a slice
        self._ranges: dict[int, tuple[Range, ...]] = {}  # what each program asks of its feeds
        self._contents: dict[int, Tensor] = {}
        self._beside: dict[int, dict[str, Tensor]] = {}  # what travels with a program
        self._lookups: dict[int, dict[str, int]] = {}

    def of(self, feeds: Sequence[Tensor]) -> tuple[int, dict[str, Tensor]]:
        """The number of the program for a slice of this shape, and the slice's feeds by name.

        Raises: WorkerError for a new shape where the graph cannot be traced again; FeedError where the step does not
            run on it, or a label or an index is out of range; SettingError as `halves`, and for a loss that is a
            sum.
        """
        key: Key = tuple((tuple(feed.shape), feed.dtype) for feed in feeds)
        if key not in self._keys:
            graph = self._graph
            if tuple((f.spec.shape, f.spec.dtype) for f in graph.feeds) != key:
                if graph.retrace is None:
                    raise WorkerError("a graph that was loaded from a file cannot be traced for slices of its batch")
                graph = self._traced(graph.retrace, feeds)
                check_ranges(feed_ranges(graph), [feeds])
                if self._variables is not None and check_mean(self._graph, graph, self._variables, feeds):
                    self._variables = None
            number = len(self._keys)
            self._contents[number] = as_tensor(graph_bytes(self._made(graph, number)))
            self._ranges[number] = feed_ranges(graph)
            self._keys[key] = number
        number = self._keys[key]
        check_ranges(self._ranges[number], [feeds])
        parts, names = self._parts[number]
        flat = [part for each in zip(*(feed.chunk(parts) for feed in feeds), strict=True) for part in each]
        return number, dict(zip(names, flat if parts > 1 else feeds, strict=True))

    def _traced(self, retrace: Callable[[Any], Graph], feeds: Sequence[Tensor]) -> Graph:
        try:
            return retrace(self._reader.nest(Batch(list(feeds), list(feeds))))
        except (MillraceError, RuntimeError, ValueError, IndexError, TypeError) as error:
            shapes = ", ".join(f"{feed.dtype} {list(feed.shape)}" for feed in feeds)
            notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
            raise FeedError(
                f"the step does not run on a batch, or a slice of one, of {shapes}: {error}{notes}"
            ) from error

    def _made(self, graph: Graph, number: int) -> Graph:
        names = tuple(feed.name for feed in graph.feeds)
        self._parts[number] = 1, names
        if self._whole:
            return graph
        cut = halves(graph)
        if self._tables:
            found = fetched_rows(cut, self._tables)
            self._beside[number] = {INDICES: as_tensor(graph_bytes(found.indices))}
            shapes = {feed.name: feed.spec.shape for feed in found.gradients.feeds}
            self._lookups[number] = {table.name: shapes[table.places_feed][0] for table in found.tables}
            return found.gradients
        parts = self._parts_of(cut)
        divided = microbatch(cut.gradients, parts)
        self._parts[number] = parts, tuple(feed.name for feed in divided.feeds)
        if self._placed is not None:
            self._beside[number] = {PIECES: as_tensor(self._placed(divided))}
        return divided

    def _parts_of(self, cut: Halves) -> int:
        """Into how many parts a slice is divided."""
        for feed in cut.exchanged if self._microbatches > 1 else ():
            if not feed.name.startswith("gradient/") and feed.spec.shape:
                raise SettingError(
                    f"microbatches={self._microbatches}: replicas exchange {feed.name!r} ({feed.spec}), which is no "
                    "gradient, and has no mean over the parts of a slice. Leave microbatches out."
                )
        sizes = {feed.spec.shape[:1] for feed in cut.gradients.feeds}
        (size,) = sizes.pop() if len(sizes) == 1 and () not in sizes else (1,)
        return max(n for n in range(1, self._microbatches + 1) if size % n == 0)

    def content(self, number: int) -> Tensor:
        """A program as it travels."""
        return self._contents[number]

    def beside(self, number: int) -> dict[str, Tensor]:
        """What travels with it: where there are tables, the graph that says which rows a slice names; pieces."""
        return self._beside.get(number, {})

    def lookups(self, number: int) -> dict[str, int]:
        """How many indices a slice of this program has for each table."""
        return self._lookups.get(number, {})


def as_tensor(content: bytes) -> Tensor:
    """Bytes, to travel beside a message."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def as_bytes(tensor: Tensor) -> bytes:
    """The reverse of `as_tensor`."""
    return tensor.numpy().tobytes()


def pieces_beside(tensors: Mapping[str, Tensor]) -> bytes:
    """The pieces of a program, where it has any."""
    return as_bytes(tensors[PIECES]) if PIECES in tensors else b""
