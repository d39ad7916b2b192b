"""The curves of a picture's arrows: from side to side of the boxes, along the lanes that the layout keeps free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from millrace.graph.picture.layout import Edge, Item, Layout, Point

_PORT = 13.0  # px between arrows at one side of a box
_BEND = 10.0  # radius of a rail's corners, px

Cubic = tuple[Point, Point, Point, Point]


@dataclass(frozen=True)
class Curve:
    """Cubic Bézier pieces, end to end."""

    pieces: tuple[Cubic, ...]

    def at(self, share: float) -> Point:
        """The point after `share` (0..1) of the pieces."""
        number = min(int(share * len(self.pieces)), len(self.pieces) - 1)
        t = share * len(self.pieces) - number
        a, b, c, d = self.pieces[number]
        weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
        x, y = (sum(w * p[axis] for w, p in zip(weights, (a, b, c, d), strict=True)) for axis in (0, 1))
        return x, y


def route(
    items: Sequence[Item], edges: Iterable[Edge], layout: Layout, hubs: frozenset[int], rail_px: float = 26.0
) -> dict[Edge, Curve]:
    """The curve of every edge.

    Inside a block arrows leave and enter at the top and bottom, between blocks at the sides. The edges of `hubs` (items
    with an edge to almost everything) run together along one rail on either side of their block.
    """
    sides = {edge: _sides(edge, items, layout, hubs) for edge in edges}
    ports = _ports(items, sides, layout, hubs)
    curves: dict[Edge, Curve] = {}
    for edge in sides:
        start, end = ports[edge]
        a, b = items[edge[0]], items[edge[1]]
        if hubs.intersection(edge):
            curves[edge] = _rail(start, end, _rail_x(edge, items, layout, rail_px))
        elif a.block != b.block or a.rank == b.rank:
            out = _way_out(start, sides[edge][0], edge[0], b, items, layout)
            back = _way_out(end, sides[edge][1], edge[1], a, items, layout)
            between = _sideways(out[-1][-1] if out else start, back[-1][-1] if back else end)
            curves[edge] = Curve((*out, between, *(piece[::-1] for piece in reversed(back))))
        else:
            curves[edge] = _down_or_up(start, end, a.rank, b.rank, layout, layout.lanes[edge])
    return curves


def _sides(edge: Edge, items: Sequence[Item], layout: Layout, hubs: frozenset[int]) -> tuple[str, str]:
    """The sides at which an arrow leaves and enters."""
    a, b = items[edge[0]], items[edge[1]]
    if hubs.intersection(edge) and a.block == b.block:
        return "right", "right"
    if a.block == b.block and a.rank != b.rank:
        return ("bottom", "top") if a.rank < b.rank else ("top", "bottom")
    rightwards = layout.centres[edge[0]][0] < layout.centres[edge[1]][0]
    plain = ("right", "left") if rightwards else ("left", "right")
    if a.block == b.block:
        return plain
    # Where another box of the row stands in the way, around it through the space between the rows.
    detour = "bottom" if b.rank >= a.rank else "top"
    return (
        detour if _blocked(edge[0], plain[0], items, layout) else plain[0],
        ("bottom" if a.rank >= b.rank else "top") if _blocked(edge[1], plain[1], items, layout) else plain[1],
    )


def _blocked(box: int, side: str, items: Sequence[Item], layout: Layout) -> bool:
    x = layout.centres[box][0]
    own = items[box]
    others = (n for n, item in enumerate(items) if n != box and (item.block, item.rank) == (own.block, own.rank))
    return any((layout.centres[n][0] > x) == (side == "right") for n in others)


def _way_out(
    start: Point, side: str, box: int, towards: Item, items: Sequence[Item], layout: Layout
) -> tuple[Cubic, ...]:
    """From the top or bottom of a box to the border of its block; nothing when the arrow starts at a side."""
    if side in ("left", "right"):
        return ()
    left, right = layout.blocks[items[box].block]
    row = layout.rows[items[box].rank]
    x = right if towards.block > items[box].block else left
    y = row.bottom + _BEND if side == "bottom" else row.top - _BEND
    corner = (start[0] + (_BEND if x > start[0] else -_BEND), y)
    return (start, (start[0], y), (start[0], y), corner), _line(corner, (x, y))


def _ports(
    items: Sequence[Item], sides: Mapping[Edge, tuple[str, str]], layout: Layout, hubs: frozenset[int]
) -> dict[Edge, tuple[Point, Point]]:
    """Where every arrow leaves and enters: spread along each side in the order of the other ends."""
    at_side: dict[tuple[int, str], list[tuple[float, Edge, int]]] = {}
    for edge, both in sides.items():
        for end, side in enumerate(both):
            box, other = edge[end], edge[1 - end]
            axis = 0 if side in ("top", "bottom") else 1
            towards = layout.centres[other][axis]
            lanes = layout.lanes.get(edge, ())
            if axis == 0 and lanes:
                towards = lanes[0 if end == 0 else -1]
            at_side.setdefault((box, side), []).append((towards, edge, end))
    found: dict[Edge, list[Point]] = {edge: [(0.0, 0.0), (0.0, 0.0)] for edge in sides}
    for (box, side), arrows in at_side.items():
        shared = box in hubs  # a hub's arrows leave as one
        length = (items[box].width if side in ("top", "bottom") else items[box].height) - 12
        step = 0.0 if shared else min(_PORT, length / len(arrows))
        for position, (_, edge, end) in enumerate(sorted(arrows)):
            offset = (position - (len(arrows) - 1) / 2) * step
            found[edge][end] = _on_side(items[box], layout.centres[box], side, offset)
    return {edge: (start, end) for edge, (start, end) in found.items()}


def _on_side(item: Item, centre: Point, side: str, offset: float) -> Point:
    x, y = centre
    if side in ("top", "bottom"):
        return x + offset, y + (item.height / 2 if side == "bottom" else -item.height / 2)
    return x + (item.width / 2 if side == "right" else -item.width / 2), y + offset


def _sideways(start: Point, end: Point) -> Cubic:
    reach = max(30.0, abs(end[0] - start[0]) / 2) * (1 if end[0] >= start[0] else -1)
    return start, (start[0] + reach, start[1]), (end[0] - reach, end[1]), end


def _vertical(start: Point, end: Point) -> Cubic:
    middle = (start[1] + end[1]) / 2
    return start, (start[0], middle), (end[0], middle), end


def _line(start: Point, end: Point) -> Cubic:
    third = ((end[0] - start[0]) / 3, (end[1] - start[1]) / 3)
    return start, (start[0] + third[0], start[1] + third[1]), (end[0] - third[0], end[1] - third[1]), end


def _down_or_up(start: Point, end: Point, first: int, last: int, layout: Layout, lanes: Sequence[float]) -> Curve:
    """Between rows a bend; past a row straight along the lane."""
    step = 1 if last > first else -1
    pieces: list[Cubic] = []
    now = start
    for lane, rank in zip(lanes, range(first + step, last, step), strict=True):
        row = layout.rows[rank]
        enter, leave = (row.top, row.bottom) if step > 0 else (row.bottom, row.top)
        pieces += [_vertical(now, (lane, enter)), _line((lane, enter), (lane, leave))]
        now = (lane, leave)
    return Curve((*pieces, _vertical(now, end)))


def _rail_x(edge: Edge, items: Sequence[Item], layout: Layout, rail_px: float) -> float:
    """Right of a block for arrows inside it, left of it for arrows that come from or go to other blocks."""
    a, b = items[edge[0]].block, items[edge[1]].block
    if a == b:
        return layout.blocks[a][1] + rail_px
    return layout.blocks[max(a, b)][0] - rail_px


def _rail(start: Point, end: Point, x: float) -> Curve:
    """Horizontally to the rail, along it, and horizontally to the end, with round corners."""
    if abs(end[1] - start[1]) < 2 * _BEND:
        return Curve((_sideways(start, end),))
    down = _BEND if end[1] > start[1] else -_BEND
    out, back = (_BEND if x > start[0] else -_BEND), (_BEND if end[0] > x else -_BEND)
    corner_1, after_1 = (x - out, start[1]), (x, start[1] + down)
    corner_2, after_2 = (x, end[1] - down), (x + back, end[1])
    return Curve(
        (
            _line(start, corner_1),
            (corner_1, (x, start[1]), (x, start[1]), after_1),
            _line(after_1, corner_2),
            (corner_2, (x, end[1]), (x, end[1]), after_2),
            _line(after_2, end),
        )
    )


def bounds(curves: Mapping[Edge, Curve]) -> tuple[float, float]:
    """The least and greatest x of all curves' control points."""
    xs = [p[0] for curve in curves.values() for piece in curve.pieces for p in piece]
    return (min(xs), max(xs)) if xs else (0.0, 0.0)
