"""Which rows of tables a slice of a batch names, the memory they are fetched into, and the gradients they get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from millrace.compile.eager import Compiled, compile_eager
from millrace.graph.graph import Graph
from millrace.graph.passes.fetched_rows import Table, summed_rows, unique_rows
from millrace.graph.signature import TensorSpec
from millrace.replicas.shard_store import Rows


@dataclass(frozen=True)
class Named:
    """The rows that a slice names. wanted: of tables by name: each row once, and memory for its values, to be filled.
    feeds: what the program of the slice takes beside the step's own feeds; the rows lie in that memory."""

    wanted: Mapping[str, Rows]
    feeds: Mapping[str, Tensor]


class BatchRows:
    """Finds the rows of slices. tables: what servers hold of which only rows travel, by name."""

    def __init__(self, tables: Mapping[str, TensorSpec]) -> None:
        self._tables = [Table(name, spec, f"gradient/{name}") for name, spec in tables.items()]
        self._indices: dict[int, tuple[Graph, Compiled]] = {}

    def load(self, key: int, indices: Graph) -> None:
        """Make the graph that finds the indices of slices of one shape ready under the number `key`."""
        self._indices[key] = (indices, compile_eager(indices))

    def named(self, key: int, feeds: Mapping[str, Tensor]) -> Named:
        """The rows of a slice. Raises: FeedError for an index that a table does not have."""
        if not self._tables:
            return Named({}, {})
        graph, run = self._indices[key]
        found = run([], [feeds[feed.name] for feed in graph.feeds])
        indices = dict(zip(graph.fetches, found, strict=True))
        wanted: dict[str, Rows] = {}
        given: dict[str, Tensor] = {}
        for table in self._tables:
            rows, places = unique_rows(indices[table.indices_fetch], table.spec.shape[0])
            memory = torch.zeros((len(places), *table.spec.shape[1:]), dtype=table.spec.dtype)
            wanted[table.name] = Rows(rows, memory[: len(rows)])
            given |= {table.rows_feed: memory, table.places_feed: places}
        return Named(wanted, given)

    def gradients(self, named: Named, values: dict[str, Tensor]) -> dict[str, Rows]:
        """Take the gradients of tables out of what a program gave."""
        return {
            table.name: Rows(rows := named.wanted[table.name].rows, values.pop(table.exchanged)[: len(rows)])
            for table in self._tables
        }


def added(one: Mapping[str, Rows], other: Mapping[str, Rows]) -> dict[str, Rows]:
    """The sums of row gradients of the same tables, each row once."""
    return {
        name: Rows(*summed_rows([(given.rows, given.values), (other[name].rows, other[name].values)]))
        for name, given in one.items()
    }
