"""The rows of tables that the members of a group name between them: one member fetches them for all, and pushes their
gradients.

Every member tells the others which rows its slices look up, so that all know the same rows in the same order. What
they then give each other is the values of these, and the sums of their gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from millrace.graph.signature import TensorSpec
from millrace.replicas.batch_rows import Named
from millrace.replicas.collective import Group
from millrace.replicas.shard_store import Rows


def rows_of_all(
    group: Group, named: Sequence[Named], lookups: Sequence[Mapping[str, int]], tables: Mapping[str, TensorSpec]
) -> dict[str, Rows]:
    """The rows that all members name, each once and ascending, and memory for their values: the same on all ranks.

    Args: named: by this rank's slices. lookups: of every rank, how many indices its slices have, by table. tables: what
        servers hold of which only rows travel, by name.

    Raises: WorkerError as `Group.broadcast`.
    """
    parts = {name: [torch.empty(0, dtype=torch.int64)] for name in tables}
    for rank, counts in enumerate(lookups):
        told = {name: torch.empty(count, dtype=torch.int64) for name, count in counts.items() if count}
        for name, rows in told.items():
            if rank == group.rank:  # the others know how many indices there are; a row that comes again changes nothing
                own = torch.cat([one.wanted[name].rows for one in named])
                rows.fill_(own[0])[: len(own)] = own
            parts[name].append(rows)
        if told:
            group.broadcast(list(told.values()), rank)
    found = {}
    for name, spec in tables.items():
        rows = torch.unique(torch.cat(parts[name]))
        found[name] = Rows(rows, torch.empty((len(rows), *spec.shape[1:]), dtype=spec.dtype))
    return found


def fill(named: Named, fetched: Mapping[str, Rows]) -> None:
    """Give a slice the values of its rows."""
    for name, wanted in named.wanted.items():
        wanted.values.copy_(fetched[name].values[_places(fetched[name], wanted.rows)])


def add_rows(sums: Mapping[str, Rows], gradients: Mapping[str, Rows], weight: float) -> None:
    """Add weight × a slice's gradients, whose rows are some of those of the sums."""
    for name, gradient in gradients.items():
        sums[name].values.index_add_(0, _places(sums[name], gradient.rows), gradient.values, alpha=weight)


def _places(among: Rows, rows: Tensor) -> Tensor:
    return torch.searchsorted(among.rows, rows)
