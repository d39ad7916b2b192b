"""Where the boxes of a picture go: a layered layout in several blocks that share their rows.

After Sugiyama, Tagawa and Toda, "Methods for visual understanding of hierarchical system structures" (IEEE Trans. SMC,
1981): every item has a rank (its row); long edges are cut by invisible items, one per row that they pass; the items of
a row are sorted by the barycentre of their neighbours to avoid crossings; then each item moves as near to its
neighbours as the order permits (an isotonic regression per row). Pure: sizes and edges in, points out.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Edge = tuple[int, int]
Point = tuple[float, float]

_SWEEPS = 8
_LANE = 16.0  # px between an edge that passes a row and its neighbours


@dataclass(frozen=True)
class Item:
    """One box: its size in px, the block (a column of the picture) and the rank (row) that it stands in."""

    width: float
    height: float
    block: int
    rank: int


@dataclass(frozen=True)
class Row:
    """The vertical extent of a rank, in px."""

    top: float
    bottom: float


@dataclass(frozen=True)
class Layout:
    """Centres of the items, the lanes of edges inside a block (the x at which they pass each row between their ends,
    from source to target), and extents, in px."""

    centres: tuple[Point, ...]
    lanes: Mapping[Edge, tuple[float, ...]]
    rows: tuple[Row, ...]
    blocks: Mapping[int, tuple[float, float]]  # block -> left, right
    width: float
    height: float


def ranks(count: int, edges: Sequence[Edge]) -> list[int]:
    """The length of the longest path that leads to each of `count` items; items without predecessor stand just above
    their first successor. `edges` run from smaller to greater numbers."""
    rank = [0] * count
    for source, target in sorted(edges):
        rank[target] = max(rank[target], rank[source] + 1)
    below: dict[int, int] = {}
    for source, target in edges:
        below[source] = min(rank[target], below.get(source, rank[target]))
    for item in below.keys() - {target for _, target in edges}:
        rank[item] = below[item] - 1
    return rank


def arrange(
    items: Sequence[Item],
    edges: Sequence[Edge],
    *,
    gap: float = 28.0,
    row_gap: float = 44.0,
    block_gap: float = 120.0,
    space_above: Mapping[int, float] | None = None,
) -> Layout:
    """Place every item.

    Args:
        edges: pairs of item numbers; those between blocks only decide the order in a row where nothing else does.
        gap, row_gap, block_gap: px between neighbours in a row, between rows, between blocks.
        space_above: rank -> further px above that row.
    """
    rows = _rows(items, row_gap, space_above or {})
    centres: dict[int, Point] = {}
    lanes: dict[Edge, tuple[float, ...]] = {}
    blocks: dict[int, tuple[float, float]] = {}
    left = 0.0
    for block in sorted({item.block for item in items}):
        members = [n for n, item in enumerate(items) if item.block == block]
        inside = [e for e in edges if items[e[0]].block == items[e[1]].block == block]
        beside = {n: [centres[m][0] for e in edges if n in e for m in e if m in centres] for n in members}
        hints = {n: sum(xs) / len(xs) for n, xs in beside.items() if xs}
        drawing = _Block({n: items[n] for n in sorted(members, key=lambda n: hints.get(n, 0.0))}, inside, gap)
        x = drawing.positions()
        # Lanes may run outside the outermost boxes.
        shift = left - min(at - drawing.width[n] / 2 for n, at in x.items())
        right = max(at + drawing.width[n] / 2 for n, at in x.items()) + shift
        for n in members:
            row = rows[items[n].rank]
            centres[n] = (x[n] + shift, (row.top + row.bottom) / 2)
        for edge, chain in drawing.chains.items():
            lanes[edge] = tuple(x[lane] + shift for lane in chain)
        blocks[block] = (left, right)
        left = right + block_gap
    width = left - block_gap if items else 0.0
    height = rows[-1].bottom if rows else 0.0
    return Layout(tuple(centres[n] for n in range(len(items))), lanes, rows, blocks, width, height)


def _rows(items: Sequence[Item], row_gap: float, space_above: Mapping[int, float]) -> tuple[Row, ...]:
    rows: list[Row] = []
    y = 0.0
    for rank in range(max((item.rank for item in items), default=-1) + 1):
        y += space_above.get(rank, 0.0)
        height = max((item.height for item in items if item.rank == rank), default=0.0)
        rows.append(Row(y, y + height))
        y += height + row_gap
    return tuple(rows)


class _Block:
    """The items of one block and the lanes of its edges, first as an order per row, then as positions.

    Items keep their numbers; lanes get negative ones.
    """

    def __init__(self, items: Mapping[int, Item], edges: Sequence[Edge], gap: float) -> None:
        self.gap = gap
        self.width = {n: item.width for n, item in items.items()}
        self.rank = {n: item.rank for n, item in items.items()}
        self.chains: dict[Edge, tuple[int, ...]] = {}
        self.near: dict[int, set[int]] = {n: set() for n in items}
        for source, target in edges:
            self._connect(source, target)
        self.order: dict[int, list[int]] = {}
        for n, rank in self.rank.items():
            self.order.setdefault(rank, []).append(n)
        self._sort()

    def _connect(self, source: int, target: int) -> None:
        """Cut an edge into pieces between neighbouring rows."""
        step = 1 if self.rank[target] > self.rank[source] else -1
        chain: list[int] = []
        before = source
        for rank in range(self.rank[source] + step, self.rank[target], step):
            lane = -len(self.rank) - 1
            self.width[lane], self.rank[lane], self.near[lane] = 0.0, rank, set()
            chain.append(lane)
            self._join(before, lane)
            before = lane
        if self.rank[source] != self.rank[target]:
            self._join(before, target)
        self.chains[source, target] = tuple(chain)

    def _join(self, a: int, b: int) -> None:
        self.near[a].add(b)
        self.near[b].add(a)

    def _sort(self) -> None:
        """Sweep down and up; keep the order with the fewest crossings."""
        best, fewest = {r: list(o) for r, o in self.order.items()}, self.crossings()
        for sweep in range(_SWEEPS):
            for rank in sorted(self.order, reverse=bool(sweep % 2)):
                self._sort_row(rank, rank + (1 if sweep % 2 else -1))
            crossings = self.crossings()
            if crossings < fewest:
                best, fewest = {r: list(o) for r, o in self.order.items()}, crossings
        self.order = best

    def _sort_row(self, rank: int, fixed: int) -> None:
        place = {n: float(i) for i, n in enumerate(self.order.get(fixed, []))}
        own = {n: float(i) for i, n in enumerate(self.order[rank])}

        def barycentre(n: int) -> float:
            neighbours = [place[m] for m in self.near[n] if m in place]
            return sum(neighbours) / len(neighbours) if neighbours else own[n]

        self.order[rank].sort(key=barycentre)

    def crossings(self) -> int:
        """The number of pairs of edge pieces that cross."""
        total = 0
        for rank, row in self.order.items():
            below = {n: i for i, n in enumerate(self.order.get(rank + 1, []))}
            ends: list[int] = []
            for n in row:
                ends += sorted(below[m] for m in self.near[n] if m in below)
            total += _inversions(ends)
        return total

    def positions(self) -> dict[int, float]:
        """The x of every item and lane."""
        x: dict[int, float] = {}
        for row in self.order.values():
            offsets = self._offsets(row)
            x.update({n: o - offsets[-1] / 2 for n, o in zip(row, offsets, strict=True)})
        ordered = sorted(self.order)
        for sweep in range(2 * _SWEEPS):
            for rank in reversed(ordered) if sweep % 2 else ordered:
                row = self.order[rank]
                wanted = [self._wanted(n, x, rank + (1 if sweep % 2 else -1)) for n in row]
                x.update(zip(row, _keeping_order(wanted, self._offsets(row)), strict=True))
        return x

    def _wanted(self, n: int, x: Mapping[int, float], fixed: int) -> float:
        neighbours = [x[m] for m in self.near[n] if self.rank[m] == fixed] or [x[m] for m in self.near[n]]
        return sum(neighbours) / len(neighbours) if neighbours else x[n]

    def _offsets(self, row: Sequence[int]) -> list[float]:
        """The closest x of the items of a row, the first at 0."""
        offsets = [0.0]
        for a, b in itertools.pairwise(row):
            gap = _LANE if a < 0 or b < 0 else self.gap
            offsets.append(offsets[-1] + (self.width[a] + self.width[b]) / 2 + gap)
        return offsets


def _keeping_order(wanted: Sequence[float], offsets: Sequence[float]) -> list[float]:
    """The positions nearest to `wanted` (least squares) that lie at least as far apart as `offsets`.

    With the offsets taken away this is isotonic regression, solved by pooling adjacent violators.
    """
    pools: list[tuple[float, int]] = []  # mean, count
    for value, offset in zip(wanted, offsets, strict=True):
        mean, count = value - offset, 1
        while pools and pools[-1][0] > mean:
            other, size = pools.pop()
            mean, count = (other * size + mean * count) / (size + count), size + count
        pools.append((mean, count))
    flat = [mean for mean, count in pools for _ in range(count)]
    return [mean + offset for mean, offset in zip(flat, offsets, strict=True)]


def _inversions(values: Sequence[int]) -> int:
    """The number of pairs that stand in the wrong order, by merge sort."""
    if len(values) < 2:
        return 0
    middle = len(values) // 2
    left, right = sorted(values[:middle]), sorted(values[middle:])
    total = _inversions(values[:middle]) + _inversions(values[middle:])
    i = 0
    for value in right:
        while i < len(left) and left[i] <= value:
            i += 1
        total += len(left) - i
    return total
