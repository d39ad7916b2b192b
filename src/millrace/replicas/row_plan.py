"""Of which variables on parameter servers only rows travel, and why not of the others that are looked up in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from millrace.errors import SettingError
from millrace.graph.passes.fetched_rows import looked_up, lookups_in
from millrace.graph.passes.halves import Halves
from millrace.graph.passes.idle_rows import why_not_idle
from millrace.graph.passes.row_update import row_update
from millrace.graph.passes.shards import Shard

_TRACED_ROWS = 2  # the update is run with any number


@dataclass(frozen=True)
class RowPlan:
    """shards: updating the tables by rows. tables: their names. whole: of other tables that are looked up in, why they
    travel whole."""

    shards: tuple[Shard, ...]
    tables: tuple[str, ...]
    whole: Mapping[str, str]

    @property
    def notes(self) -> list[str]:
        """A line for each table that travels whole."""
        return [f"the table {name!r} travels whole in every step: {why}" for name, why in self.whole.items()]


def row_plan(cut: Halves, parts: Sequence[Shard], all_whole: str = "") -> RowPlan:
    """Take every table whose rows can be fetched, and for which an update of rows is the update of the whole table.

    Args: parts: `shards` of the update of `cut`. all_whole: why workers can have no rows, if they cannot.
    """
    tables: list[str] = []
    whole: dict[str, str] = {}
    holders = {name: number for number, part in enumerate(parts) for name in part.variables}
    found = list(parts)
    for name, reason in looked_up(cut).items():
        part, height = parts[holders[name]], cut.gradients.variable(name).spec.shape[0]
        count = lookups_in(cut, name)
        why = reason or all_whole or why_not_idle(part.graph, name)
        if not why and count >= height:
            why = f"a batch looks {count} rows up, and it has {height}"
        if not why:
            why = _why_not_updated(part, name)
        if why:
            whole[name] = why
        else:
            tables.append(name)
    for number, part in enumerate(parts):
        own = {name: _TRACED_ROWS for name in tables if holders[name] == number}
        if own:
            found[number] = replace(part, graph=row_update(part.graph, own))
    return RowPlan(tuple(found), tuple(tables), whole)


def _why_not_updated(part: Shard, name: str) -> str:
    try:
        row_update(part.graph, {name: _TRACED_ROWS})
    except SettingError as error:
        return str(error)
    return ""
