"""The variables of a shard and how a push changes them: an update graph for whole gradients, rules for rows of tables.

Everything lies in one shared region: first what workers fetch, then the optimizer's slots and the tables. The update
runs eagerly: a shard and its copy must compute the same numbers, and two compilations might not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from millrace.errors import FeedError, FetchError, did_you_mean
from millrace.graph.graph import TRAIN, Graph
from millrace.graph.signature import Role, TensorSpec
from millrace.optim.base import Rule
from millrace.replicas.regions import Place, TensorRegion
from millrace.runtime.session import Session


@dataclass(frozen=True)
class RowUpdate:
    """How rows of a table are updated: an ordinary rule, for the rows that a push names (the others keep their slots).

    A row that occurs several times is updated once, by the sum of its gradients.
    """

    rule: Rule
    learning_rate: float
    weight_decay: float = 0.0


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
        variables: the values at the beginning; copied.
        update: its feeds are the gradients by name, its variables are among `variables`. None: there are only tables.
        tables: the variables of which only rows travel. Their slots ("optimizer/TABLE/SLOT") are made if not given.

    Raises: WorkerError when there is too little memory; FetchError, FeedError as `Session` for other variables.
    """

    def __init__(
        self,
        who: str,
        variables: Mapping[str, Tensor],
        update: Graph | None = None,
        tables: Mapping[str, RowUpdate] | None = None,
    ) -> None:
        self.who = who
        self.tables = dict(tables or {})
        given = dict(variables)
        for table, how in self.tables.items():
            made = {slot: f"optimizer/{table}/{slot}" for slot in how.rule.slots}
            if any(name not in given for name in made.values()):
                given |= {made[slot]: value for slot, value in how.rule.init(given[table]).items()}
        slots = {v.name for v in update.variables if v.role in (Role.OPTIMIZER, Role.STEP)} if update else set()
        slots |= {name for name in given if name.startswith("optimizer/")}
        self.fetched = tuple(name for name in given if name not in slots and name not in self.tables)
        order = [*self.fetched, *(name for name in given if name not in self.fetched)]
        self.region = TensorRegion.new(who, {name: TensorSpec.of(given[name]) for name in order})
        for name in order:
            self.region.tensors[name].copy_(given.pop(name).detach())
        self.region.forbid_writers()
        held = self.region.tensors
        self._session = None if update is None else Session(update, held, compile="eager")
        self.gradients = {} if update is None else {feed.name: feed.spec for feed in update.feeds}
        self._rates = {n: torch.tensor(how.learning_rate, dtype=torch.float64) for n, how in self.tables.items()}
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

    def check_rows(self, table: str, rows: Tensor, values: Tensor | None = None) -> None:
        """Raises: FeedError for rows that the table does not have, or values that are not of its rows' shape."""
        if table not in self.tables:
            raise FetchError(f"{self.who} has no table {table!r}. {did_you_mean(table, list(self.tables))}")
        held = self.tensor(table)
        if rows.ndim != 1 or rows.dtype != torch.int64:
            raise FeedError(f"rows of {table!r} must be int64 [n], got {rows.dtype} {list(rows.shape)}")
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < len(held):
            raise FeedError(f"table {table!r} has {len(held)} rows, asked for {int(rows.min())} to {int(rows.max())}")
        shape = (len(rows), *held.shape[1:])
        if values is not None and (tuple(values.shape) != shape or values.dtype != held.dtype):
            raise FeedError(f"{table!r}: {held.dtype} {list(shape)} expected, got {values.dtype} {list(values.shape)}")

    def apply(self, pushes: Sequence[Staged], weights: Sequence[float], version: int) -> None:
        """Update the variables with the weighted sum of pushes; they are of `version` then.

        Raises: StepError when the update cannot be computed; the variables may be half updated then.
        """
        self.region.word = 2 * version - 1
        if any(push.gradients for push in pushes):
            assert self._session is not None
            self._session.run(TRAIN, self._sum(pushes, weights))
        for table, how in self.tables.items():
            given = [(p.rows[table], w) for p, w in zip(pushes, weights, strict=True) if table in p.rows]
            if given:
                rows = torch.cat([r.rows for r, _ in given]) if len(given) > 1 else given[0][0].rows
                parts = [r.values if weight == 1.0 else r.values * weight for r, weight in given]
                self._update_rows(table, how, rows, torch.cat(parts) if len(parts) > 1 else parts[0], version)
        self.region.word = 2 * version

    def _sum(self, pushes: Sequence[Staged], weights: Sequence[float]) -> Mapping[str, Tensor]:
        given = [(push.gradients, w) for push, w in zip(pushes, weights, strict=True) if push.gradients]
        if len(given) == 1 and given[0][1] == 1.0:
            return given[0][0]
        for name, spec in self.gradients.items():
            if name not in self._sums:
                self._sums[name] = torch.empty(spec.shape, dtype=spec.dtype)
            total = self._sums[name]
            torch.mul(given[0][0][name], given[0][1], out=total)
            for gradients, weight in given[1:]:
                total.add_(gradients[name], alpha=weight)
        return self._sums

    @torch.no_grad()
    def _update_rows(self, table: str, how: RowUpdate, rows: Tensor, values: Tensor, version: int) -> None:
        held = self.region.tensors[table]
        slots = {slot: self.region.tensors[f"optimizer/{table}/{slot}"] for slot in how.rule.slots}
        unique, where = torch.unique(rows, return_inverse=True)
        gradient = torch.zeros((len(unique), *held.shape[1:]), dtype=held.dtype).index_add_(0, where, values)
        new, state = how.rule.update(
            held[unique],
            gradient,
            {slot: tensor[unique] for slot, tensor in slots.items()},
            learning_rate=self._rates[table],
            step=torch.tensor(version - 1),
            weight_decay=how.weight_decay,
        )
        held[unique] = new
        for slot, tensor in slots.items():
            tensor[unique] = state[slot]
