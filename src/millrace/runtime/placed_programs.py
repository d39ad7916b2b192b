"""What a divided session runs: for all fetches and shapes of batches a graph, cut into programs for its devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from millrace.compile.tiered import Say
from millrace.errors import FeedError, MillraceError
from millrace.graph.graph import TRAIN, Graph, feed_key
from millrace.graph.passes.gradients_apart import gradients_apart
from millrace.graph.passes.microbatch import microbatch
from millrace.graph.passes.prune import prune
from millrace.graph.passes.sparse_rows import sparse_rows
from millrace.graph.signature import TensorSpec
from millrace.partition.cut import cut
from millrace.partition.narrow import narrow
from millrace.partition.pieces import Piece
from millrace.partition.program import Partition
from millrace.place.wire import Wire
from millrace.runtime.aliasing import Memory
from millrace.runtime.feeds import FeedReader, Key
from millrace.runtime.ranges import Range, check_ranges, feed_ranges

Place = Callable[[Graph], Sequence[Piece]]


@dataclass(frozen=True)
class Program:
    """What some fetches need, cut. key: its number among those of a session. ranges: what its feeds may hold."""

    key: int
    graph: Graph
    fetches: tuple[str, ...]
    partition: Partition
    ranges: tuple[Range, ...]


@dataclass(frozen=True)
class _Shape:
    """The step for batches of one shape. parts: into how many microbatches they are divided."""

    graph: Graph
    parts: int


class Programs:
    """The programs of a session, made when they are first asked for; see `PlacedSession` for the arguments.

    homes: variable -> the device that it lives on.
    """

    def __init__(self, graph: Graph, place: Place, wire: Wire, microbatches: int, reduction: str, say: Say) -> None:
        self._graph, self._place, self._wire, self._say = graph, place, wire, say
        self._microbatches, self._reduction = microbatches, reduction
        self._reader = FeedReader(graph, Memory([]))
        whole = _Shape(self._divided(graph, microbatches), microbatches)
        wire.check(whole.graph)
        self._shapes: dict[Key, _Shape] = {_key(feed.spec for feed in graph.feeds): whole}
        self._programs: dict[tuple[Key, tuple[str, ...]], Program] = {}
        step = sparse_rows(whole.graph)
        self.homes = dict(cut(step, place(step)).homes)

    def for_batch(
        self, names: tuple[str, ...], feed: Any, *, checked: bool = True
    ) -> tuple[Program, dict[str, Tensor]]:
        """What runs `names` for this batch, and the step's feeds by their keys, in parts as the graph wants them.

        Args: checked: whether the batch is to be run: its labels and indices are looked at, and there must be one.
        """
        if feed is None:
            program = self._program(names, next(iter(self._shapes)))
            if checked:
                _refuse_no_batch(program.graph, names)
            nothing = {feed_key(f.name): torch.empty(f.spec.shape, dtype=f.spec.dtype) for f in program.graph.feeds}
            return program, nothing
        batch = self._reader.read(feed)
        if batch.key not in self._shapes:
            self._shapes[batch.key] = self._retraced(self._reader.nest(batch), batch.key)
        program = self._program(names, batch.key)
        parts = self._shapes[batch.key].parts
        flat = list(batch.placed)
        if parts > 1:  # a single number, which has no axis to divide, may be in a batch that is whole
            flat = [tensor for part in zip(*(t.chunk(parts) for t in flat), strict=True) for tensor in part]
        if checked:
            check_ranges(program.ranges, [flat])
        return program, {feed_key(f.name): tensor for f, tensor in zip(program.graph.feeds, flat, strict=True)}

    def _retraced(self, batch: Any, key: Key) -> _Shape:
        """The step for batches of another shape."""
        got = ", ".join(f"{f.name} {list(shape)}" for f, (shape, _) in zip(self._graph.feeds, key, strict=True))
        expected = ", ".join(f"{f.name} {list(f.spec.shape)}" for f in self._graph.feeds)
        if self._graph.retrace is None or any(
            d != f.spec.dtype for f, (_, d) in zip(self._graph.feeds, key, strict=True)
        ):
            raise FeedError(
                f"the batch is {got}, but the graph was traced for {expected}, and the dtypes must be its own."
            )
        try:
            graph = self._graph.retrace(batch)
        except (MillraceError, RuntimeError, ValueError, IndexError, TypeError) as error:
            raise FeedError(
                f"the batch is {got} instead of {expected}, and the step does not run on that: {error}"
            ) from error
        self._say(f"a batch of another shape ({got}): the step was traced and cut again")
        sizes = {shape[0] for shape, _ in key if shape}
        size = sizes.pop() if len(sizes) == 1 else 1
        parts = max(n for n in range(1, self._microbatches + 1) if size % n == 0)
        return _Shape(self._divided(graph.with_(initial={}), parts), parts)

    def _program(self, names: tuple[str, ...], key: Key) -> Program:
        if (key, names) not in self._programs:
            whole = self._shapes[key].graph
            wanted = tuple(dict.fromkeys(name for name in names if name != TRAIN))
            part = sparse_rows(prune(whole, wanted, whole.updates if TRAIN in names else ()))
            partition = narrow(cut(part, self._place(part), self.homes), part, self._wire)
            self._programs[key, names] = Program(len(self._programs), part, wanted, partition, feed_ranges(part))
        return self._programs[key, names]

    def _divided(self, graph: Graph, parts: int) -> Graph:
        return gradients_apart(microbatch(graph, parts, reduction=self._reduction))


def _refuse_no_batch(graph: Graph, names: Sequence[str]) -> None:
    inputs = graph.placeholders()
    for feed in graph.feeds:
        if inputs[feed_key(feed.name)].users:
            raise FeedError(f"{', '.join(names)} needs the feed {feed.name!r} ({feed.spec}), but no batch was given")


def _key(specs: Iterable[TensorSpec]) -> Key:
    return tuple((spec.shape, spec.dtype) for spec in specs)
