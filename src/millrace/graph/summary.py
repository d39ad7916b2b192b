"""A graph on one screen: what each module holds, computes and keeps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable
from typing import TypeVar

from millrace.graph.graph import Graph, info
from millrace.graph.scopes import SHARED, cut, fitting_depth, owner_scope, scope_of
from millrace.graph.signature import Phase, Role
from millrace.graph.sizes import human_bytes, new_bytes

_ROWS = 30
_TITLES = {"": "(step)", SHARED: "(shared)"}
_K = TypeVar("_K", bound=Hashable)


def summary(graph: Graph, *, rows: int = _ROWS) -> str:
    """A table with one row per module: its parameters, and per phase its nodes and the memory that they fill.

    Modules are shown as deep as fits on `rows` rows; a module's row counts what is inside it and has no row of its own.
    Nodes outside every module, the loss among them, are the row "(step)". Update nodes count for the module of their
    variable, those that serve several variables for the row "(shared)". Memory is that of the results of all nodes, as
    if none were freed; views take none.
    """
    parameters: Counter[str] = Counter()
    for variable in graph.variables:
        if variable.role is Role.PARAMETER:
            parameters[owner_scope(variable.name)] += math.prod(variable.spec.shape)
    nodes: Counter[tuple[str, Phase]] = Counter()
    memory: Counter[tuple[str, Phase]] = Counter()
    for node in graph.nodes:
        nodes[scope_of(node), info(node).phase] += 1
        memory[scope_of(node), info(node).phase] += new_bytes(node)
    depth = fitting_depth({*parameters, *(scope for scope, _ in nodes)}, rows)
    parameters = _summed((cut(s, depth), n) for s, n in parameters.items())
    nodes = _summed(((cut(s, depth), p), n) for (s, p), n in nodes.items())
    memory = _summed(((cut(s, depth), p), n) for (s, p), n in memory.items())
    phases = [p for p in Phase if any(phase is p for _, phase in nodes)]
    table = [["module", "parameters", *(cell for p in phases for cell in (f"{p} nodes", "memory"))]]
    for scope in dict.fromkeys([*(scope for scope, _ in nodes), *parameters]):
        cells = [c for p in phases for c in _cells(nodes[scope, p], memory[scope, p])]
        table.append([_TITLES.get(scope, scope), f"{parameters[scope]:,}" if parameters[scope] else "", *cells])
    totals = [c for p in phases for c in _cells(_of(nodes, p), _of(memory, p))]
    table.append(["total", f"{parameters.total():,}", *totals])
    return _aligned(table)


def _summed(entries: Iterable[tuple[_K, int]]) -> Counter[_K]:
    total: Counter[_K] = Counter()
    for key, count in entries:
        total[key] += count
    return total


def _of(counts: Counter[tuple[str, Phase]], phase: Phase) -> int:
    return sum(n for (_, p), n in counts.items() if p is phase)


def _cells(nodes: int, memory_bytes: int) -> tuple[str, str]:
    return (str(nodes), human_bytes(memory_bytes)) if nodes else ("", "")


def _aligned(table: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in table
    ]
    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([lines[0].rstrip(), rule, *(line.rstrip() for line in lines[1:-1]), rule, lines[-1].rstrip()])
