"""A picture as SVG text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from millrace.graph.picture.colours import paints_of
from millrace.graph.picture.elements import arrow_head, dashed, head_identity, text_at, text_width
from millrace.graph.picture.frames import Frame, frames
from millrace.graph.picture.layout import Edge, Item, Layout, Point, arrange
from millrace.graph.picture.legend import ARROWS, legend
from millrace.graph.picture.picture import FEED, FETCH, Box, Picture
from millrace.graph.picture.routes import Curve, bounds, route
from millrace.graph.scopes import SHARED
from millrace.graph.signature import Phase
from millrace.graph.sizes import human_bytes

_MARGIN = 28.0
_TITLE = 26.0  # px from the upper edge to the title's baseline
_HEADING = 34.0  # px above the first row: the blocks' headings
_LINE = 15.0
_PADDING = 11.0
_BOLD = 1.1  # how much wider bold letters are
_WIDEST = 34  # characters in a box's title or line
_FONT = "'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"
# Where along an arrow its label may stand.
_ALONG: tuple[float, ...] = (0.5, 0.42, 0.58, 0.34, 0.66, 0.26, 0.74, 0.18, 0.82)
_ANYWHERE = tuple(n / 50 for n in range(2, 49))  # between devices, rather than nowhere
_AT_SOURCE: tuple[float, ...] = (0.1, 0.07, 0.13, 0.04)
_AT_TARGET: tuple[float, ...] = (0.9, 0.93, 0.87, 0.96)
_HEADINGS = {0: "forward ↓", 1: "backward ↑", 2: "update"}


def to_svg(picture: Picture) -> str:
    """Lay the picture out and draw it. The same picture gives the same text."""
    items = [Item(*_size(box), box.block, box.rank) for box in picture.boxes]
    around = frames(picture)
    space: dict[int, float] = {}
    for frame in around:
        space[frame.first] = space.get(frame.first, 0.0) + 20.0
        space[frame.last + 1] = space.get(frame.last + 1, 0.0) + 10.0
    hubs = frozenset(n for n, b in enumerate(picture.boxes) if picture.by_module and b.scope == SHARED)
    layout = arrange(
        items,
        [edge for edge in picture.arrows if not hubs.intersection(edge)],
        gap=30 if picture.by_module else 20,
        row_gap=44 if picture.by_module else 34,
        block_gap=150 if picture.by_module else 110,
        space_above=space,
    )
    # Where devices are shown, there is a label between a box and the rail.
    curves = route(items, picture.arrows, layout, hubs, 62.0 if picture.devices else 26.0)
    return _Drawing(picture, items, layout, curves, around).text()


def _size(box: Box) -> tuple[float, float]:
    texts = [text_width(_clipped(box.title), 13.0) * _BOLD, *(text_width(_clipped(line), 11.0) for line in box.lines)]
    return max(max(texts) + 2 * _PADDING, 64.0), 2 * _PADDING - 4 + _LINE * (1 + len(box.lines))


def _clipped(text: str) -> str:
    """The text with its middle left out where it is too long: the ends of a path tell most."""
    if len(text) <= _WIDEST:
        return text
    return f"{text[: _WIDEST // 2 - 2]}…{text[-(_WIDEST // 2) :]}"


class _Drawing:
    """Writes the elements in drawing order: frames, arrows, boxes, then the labels of arrows."""

    def __init__(
        self,
        picture: Picture,
        items: Sequence[Item],
        layout: Layout,
        curves: dict[Edge, Curve],
        frames: Sequence[Frame],
    ) -> None:
        self.picture, self.items, self.layout, self.curves, self.frames = picture, items, layout, curves, frames
        least, greatest = bounds(curves)
        self.left = min(least, 0.0) - _MARGIN
        self.right = max(greatest, layout.width, 560.0 - 2 * _MARGIN) + _MARGIN
        self.bottom = layout.height + _MARGIN + (10.0 if frames else 0.0)
        self.paints = paints_of(picture)
        self.taken = [self._rectangle(n) for n in range(len(items))]
        carried = [self.carries(edge) for edge in self.curves]
        high = legend(picture, self.paints, carried, 0.0, 0.0).bottom
        self.top = -(_TITLE + high + _HEADING)
        self.head = legend(picture, self.paints, carried, self.left + _MARGIN, self.top + _TITLE)
        self.right = max(self.right, self.head.right + _MARGIN / 2)

    def text(self) -> str:
        width, height = self.right - self.left, self.bottom - self.top
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
            f'viewBox="{self.left:.1f} {self.top:.1f} {width:.1f} {height:.1f}" font-family="{_FONT}">',
            "<defs>",
            *(arrow_head(name, colour) for name, (colour, _) in ARROWS.items()),
            "</defs>",
            f'<rect x="{self.left:.1f}" y="{self.top:.1f}" width="{width:.1f}" height="{height:.1f}" fill="#ffffff"/>',
            *self.head.parts,
            *self.headings(),
            *(self.frame(c) for c in self.frames),
            *(self.arrow(edge) for edge in self._by_weight()),
            *(part for n in range(len(self.items)) for part in self.box(n)),
            *self.labels(),
            "</svg>",
        ]
        return "\n".join(parts) + "\n"

    def _by_weight(self) -> list[Edge]:
        """The arrows, those between devices last: on top of the others, and first where there is room for labels."""
        return sorted(self.curves, key=self.picture.crosses)

    def headings(self) -> Iterator[str]:
        for block, (left, right) in self.layout.blocks.items():
            yield text_at((left + right) / 2, -16, _HEADINGS[block], 13, "#475569", "middle", "600")

    def frame(self, frame: Frame) -> str:
        rows, blocks = self.layout.rows, self.layout.blocks
        inset = 18.0 - 5 * min(frame.level, 3)
        left = min(blocks[b][0] for b in frame.blocks) - inset
        right = max(blocks[b][1] for b in frame.blocks) + inset
        inner = sum(c.first == frame.first and c.level > frame.level for c in self.frames if c.blocks == frame.blocks)
        ends = sum(c.last == frame.last and c.level > frame.level for c in self.frames if c.blocks == frame.blocks)
        top, bottom = rows[frame.first].top - 24 - 20 * inner, rows[frame.last].bottom + 10 + 10 * ends
        return (
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" rx="10" '
            f'fill="#64748b" fill-opacity="0.045" stroke="#cbd5e1"/>'
            + text_at(left + 10, top + 15, frame.scope, 11, "#64748b", weight="600")
        )

    def carries(self, edge: Edge) -> str:
        """What an arrow stands for: a key of the legend."""
        a, b = (self.picture.boxes[n] for n in edge)
        if self.picture.crosses(edge):
            return "between devices"
        if self.picture.devices:
            return "within a device"
        if SHARED in (a.scope, b.scope):
            return "shared"
        if b.kind == Phase.UPDATE:
            return "gradients to the update" if a.kind == Phase.BACKWARD else "activations"
        if b.kind == Phase.BACKWARD:
            return "gradients" if a.kind == Phase.BACKWARD else "kept for the backward pass"
        return "activations"

    def arrow(self, edge: Edge) -> str:
        name = self.carries(edge)
        stroke, dashes = ARROWS[name]
        size = self.picture.arrows[edge]
        # A factor of 1000 in bytes is one pixel.
        width = min(max(1.0, 1.0 + math.log10(max(size, 1) / 1024) / 3), 4.0) + 0.8 * self.picture.crosses(edge)
        curve = self.curves[edge]
        path = f"M{_point(curve.pieces[0][0])}" + "".join(
            f" C{_point(b)} {_point(c)} {_point(d)}" for _, b, c, d in curve.pieces
        )
        source, target = (self.picture.boxes[n].title for n in edge)
        return (
            f'<path d="{path}" fill="none" stroke="{stroke}" stroke-width="{width:.2f}"{dashed(dashes)} '
            f'marker-end="url(#{head_identity(name)})"><title>{escape(source)} → {escape(target)}: '
            f"{human_bytes(size)}</title></path>"
        )

    def box(self, number: int) -> Iterator[str]:
        box, item = self.picture.boxes[number], self.items[number]
        fill, stroke = self.paints[box.colour]
        x, y, width, height = self._rectangle(number)
        radius = height / 2 if box.kind in (FEED, FETCH) else 7.0
        yield (
            f'<g><title>{escape(box.title)}\n{escape(box.details)}</title><rect x="{x:.1f}" y="{y:.1f}" '
            f'width="{width:.1f}" height="{height:.1f}" rx="{radius:.1f}" fill="{fill}" stroke="{stroke}"/>'
        )
        middle, baseline = x + item.width / 2, y + _PADDING + 10
        ink = "#1e293b" if box.device else "#475569"  # the fills of devices are darker
        yield text_at(middle, baseline, _clipped(box.title), 13, "#0f172a", "middle", "600")
        for line in box.lines:
            baseline += _LINE
            yield text_at(middle, baseline, _clipped(line), 11, ink, "middle")
        yield "</g>"

    def labels(self) -> Iterator[str]:
        """The bytes of the arrows, where there is room; the others show theirs on hovering."""
        for edge in reversed(self._by_weight()):
            name, crosses = self.carries(edge), self.picture.crosses(edge)
            # Arrows from and to what serves several variables run along one line, where labels would be in a heap.
            hub = [self.picture.boxes[n].scope == SHARED for n in edge] if self.picture.by_module else [False, False]
            if (any(hub) and not crosses) or (not self.picture.by_module and name == "kept for the backward pass"):
                continue
            label = human_bytes(self.picture.arrows[edge])
            shares = _AT_TARGET if hub[0] else _AT_SOURCE if hub[1] else _ALONG
            shares += _ANYWHERE if crosses else ()
            width = text_width(label, 10) * (_BOLD if crosses else 1.0) + 4
            place = self._free_place(self.curves[edge], shares, width)
            if place is not None:
                x, y, width, height = place
                colour, weight = (ARROWS[name][0], "700") if crosses else ("#475569", "400")
                yield (
                    f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="3" fill="#ffffff" '
                    f'fill-opacity="0.85"/>'
                ) + text_at(x + width / 2, y + 10, label, 10, colour, "middle", weight)

    def _free_place(self, curve: Curve, shares: Sequence[float], width: float) -> Rectangle | None:
        for share in shares:
            x, y = curve.at(share)
            place = (x - width / 2, y - 6.5, width, 13.0)
            if not any(_overlap(place, other) for other in self.taken):
                self.taken.append(place)
                return place
        return None

    def _rectangle(self, number: int) -> tuple[float, float, float, float]:
        (x, y), item = self.layout.centres[number], self.items[number]
        return x - item.width / 2, y - item.height / 2, item.width, item.height


Rectangle = tuple[float, float, float, float]  # x, y, width, height


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def _point(point: Point) -> str:
    return f"{point[0]:.1f},{point[1]:.1f}"
