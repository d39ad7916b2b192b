"""The variables of a shard, and how pushes change them: by an update graph, whose feeds are gradients.

Everything lies in one shared region: first what workers fetch, then the optimizer's slots and the tables. The update
runs eagerly: a shard and its copy must compute the same numbers, and two compilations might not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from millrace.compile.eager import compile_eager
from millrace.errors import FeedError, FetchError, StepError, did_you_mean
from millrace.graph.graph import Graph
from millrace.graph.passes.fetched_rows import summed_rows
from millrace.graph.signature import Role, TensorSpec
from millrace.replicas.regions import Place, TensorRegion

_INDICES, _GRADIENT = "indices/", "gradient/"  # the feeds of a table, as `passes.row_update` names them
_FEW = 128  # so few numbers Python looks at sooner than an operator is called


@dataclass(frozen=True)
class Rows:
    """Gradients of some rows of a table. rows: int64 [n]. values: [n, ...] as the table's rows."""

    rows: Tensor
    values: Tensor


@dataclass(frozen=True)
class Staged:
    """A push that lies here whole. gradients: by feed of the update graph, or none of them. rows: by table."""

    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Rows] = field(default_factory=dict)


class ShardStore:
    """Variables in shared memory.

    Args:
        who: names the shard in errors.
        variables: the values at the beginning, for all that `update` has; copied.
        update: its feeds are the gradients by name, and for each table of which only rows travel "indices/TABLE" and
            "gradient/TABLE" (`passes.row_update` makes that of an ordinary update).

    Raises: WorkerError when there is too little memory; FetchError, FeedError for other variables than `update` has.
    """

    def __init__(self, who: str, variables: Mapping[str, Tensor], update: Graph) -> None:
        self.who = who
        self.tables = tuple(f.name.removeprefix(_INDICES) for f in update.feeds if f.name.startswith(_INDICES))
        own = {f"{part}{table}" for table in self.tables for part in (_INDICES, _GRADIENT)}
        self.gradients = {feed.name: feed.spec for feed in update.feeds if feed.name not in own}
        self._feeds = [feed.name for feed in update.feeds]
        specs = {variable.name: variable.spec for variable in update.variables}
        _check(who, specs, variables)
        slots = {v.name for v in update.variables if v.role in (Role.OPTIMIZER, Role.STEP)}
        self.fetched = tuple(name for name in specs if name not in slots and name not in self.tables)
        order = [*self.fetched, *(name for name in specs if name not in self.fetched)]
        self.region = TensorRegion.new(who, {name: specs[name] for name in order})
        for name in order:
            self.region.tensors[name].copy_(variables[name].detach())
        self.region.forbid_writers()
        self._variables = [self.region.tensors[name] for name in specs]
        self._update = compile_eager(update)
        self._sums: dict[str, Tensor] = {}

    @property
    def fetched_places(self) -> tuple[Place, ...]:
        """Where workers find what they fetch: the beginning of the region."""
        return self.region.places[: len(self.fetched)]

    def tensor(self, name: str) -> Tensor:
        """A variable, in place. Raises: FetchError."""
        if name not in self.region.tensors:
            raise FetchError(f"{self.who} holds no {name!r}. {did_you_mean(name, list(self.region.tensors))}")
        return self.region.tensors[name]

    def apply(self, pushes: Sequence[Staged], weights: Sequence[float], version: int) -> None:
        """Update the variables with the weighted sum of pushes; they are of `version` then.

        What no push has counts as zero, and of a table as no rows.

        Raises: StepError when the update cannot be computed; the variables may be half updated then.
        """
        feeds = dict(self._sum(pushes, weights))
        for table in self.tables:
            feeds[_INDICES + table], feeds[_GRADIENT + table] = self._rows(table, pushes, weights)
        self.region.word = 2 * version - 1
        try:
            self._update(self._variables, [feeds[name] for name in self._feeds])
        except (RuntimeError, IndexError, ValueError) as error:
            raise StepError(f"{self.who} could not make update {version}: {error}") from error
        self.region.word = 2 * version

    def _sum(self, pushes: Sequence[Staged], weights: Sequence[float]) -> Mapping[str, Tensor]:
        if not self.gradients:
            return {}
        given = [(push.gradients, w) for push, w in zip(pushes, weights, strict=True) if push.gradients]
        if len(given) == 1 and given[0][1] == 1.0:
            return given[0][0]
        if not self._sums:
            self._sums = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in self.gradients.items()}
        for name, total in self._sums.items():
            if not given:
                total.zero_()
                continue
            torch.mul(given[0][0][name], given[0][1], out=total)
            for gradients, weight in given[1:]:
                total.add_(gradients[name], alpha=weight)
        return self._sums

    def _rows(self, table: str, pushes: Sequence[Staged], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        """The rows that pushes name, each once, and the weighted sums of their gradients."""
        held = self.region.tensors[table]
        given = [(p.rows[table], w) for p, w in zip(pushes, weights, strict=True) if table in p.rows]
        if not given:
            return torch.empty(0, dtype=torch.int64), torch.empty((0, *held.shape[1:]), dtype=held.dtype)
        pairs = [(r.rows, r.values if weight == 1.0 else r.values * weight) for r, weight in given]
        return pairs[0] if len(pairs) == 1 and are_distinct(pairs[0][0]) else summed_rows(pairs)


def _check(who: str, specs: Mapping[str, TensorSpec], given: Mapping[str, Tensor]) -> None:
    for name, spec in specs.items():
        if name not in given:
            raise FetchError(f"{who} was given no value for its variable {name!r}. {did_you_mean(name, list(given))}")
        if not spec.fits(given[name]):
            got = f"{given[name].dtype} {list(given[name].shape)}"
            raise FeedError(f"variable {name!r} of {who} is {spec} in the update graph, got {got}.")


def check_rows(table: str, spec: TensorSpec, rows: Tensor) -> None:
    """Raises: FeedError for rows that the table does not have."""
    if rows.ndim != 1 or rows.dtype != torch.int64:
        raise FeedError(f"rows of {table!r} must be int64 [n], got {rows.dtype} {list(rows.shape)}")
    if not rows.numel():
        return
    if rows.numel() <= _FEW:
        known = rows.tolist()
        first, last = min(known), max(known)
    else:
        first, last = (int(end) for end in torch.aminmax(rows))
    if first < 0 or last >= spec.shape[0]:
        raise FeedError(f"table {table!r} has {spec.shape[0]} rows, asked for {first} to {last}")


def are_distinct(rows: Tensor) -> bool:
    """Whether no row is named twice. Of many rows it is seen only where they ascend, as those of workers do."""
    if rows.numel() <= _FEW:
        return len(set(rows.tolist())) == rows.numel()
    return bool((rows[1:] > rows[:-1]).all())


def check_values(table: str, spec: TensorSpec, given: Rows) -> None:
    """Raises: FeedError for gradients of another shape than these rows have; the rows are not looked at."""
    shape = (given.rows.numel(), *spec.shape[1:])
    if given.rows.dtype != torch.int64 or tuple(given.values.shape) != shape or given.values.dtype != spec.dtype:
        raise FeedError(
            f"{table!r}: int64 rows and {spec.dtype} {list(shape)} expected, got {given.rows.dtype} and "
            f"{given.values.dtype} {list(given.values.shape)}"
        )
