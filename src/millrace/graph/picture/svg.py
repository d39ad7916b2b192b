"""A picture as SVG text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from millrace.graph.picture.frames import Frame, frames
from millrace.graph.picture.layout import Edge, Item, Layout, Point, arrange
from millrace.graph.picture.picture import FEED, FETCH, Box, Picture
from millrace.graph.picture.routes import Curve, bounds, route
from millrace.graph.scopes import SHARED
from millrace.graph.signature import Phase
from millrace.graph.sizes import human_bytes

_MARGIN = 28.0
_HEAD = 92.0  # px above the first row: title, legend and the blocks' headings
_LINE = 15.0
_PADDING = 11.0
_BOLD = 1.1  # how much wider bold letters are
_WIDEST = 34  # characters in a box's title or line
_FONT = "'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"
_PHASE_COLOURS = {
    FEED: ("#f1f5f9", "#64748b"),
    str(Phase.FORWARD): ("#dbeafe", "#2563eb"),
    str(Phase.BACKWARD): ("#ffedd5", "#ea580c"),
    str(Phase.UPDATE): ("#dcfce7", "#16a34a"),
    FETCH: ("#fef9c3", "#a16207"),
}
_OTHER_COLOURS = (
    ("#dbeafe", "#2563eb"),
    ("#ffedd5", "#ea580c"),
    ("#dcfce7", "#16a34a"),
    ("#f3e8ff", "#9333ea"),
    ("#ffe4e6", "#e11d48"),
    ("#cffafe", "#0891b2"),
    ("#fef9c3", "#a16207"),
    ("#e2e8f0", "#475569"),
)
_HEADINGS = {0: "forward ↓", 1: "backward ↑", 2: "update"}
# what an arrow carries -> stroke, dashes
_ARROWS = {
    "activations": ("#64748b", ""),
    "kept for the backward pass": ("#94a3b8", "5 4"),
    "gradients": ("#ea580c", ""),
    "gradients to the update": ("#16a34a", ""),
    "shared": ("#cbd5e1", ""),
}


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
    curves = route(items, picture.arrows, layout, hubs)
    return _Drawing(picture, items, layout, curves, around).text()


def _size(box: Box) -> tuple[float, float]:
    texts = [text_width(_clipped(box.title), 13.0) * _BOLD, *(text_width(_clipped(line), 11.0) for line in box.lines)]
    return max(max(texts) + 2 * _PADDING, 64.0), 2 * _PADDING - 4 + _LINE * (1 + len(box.lines))


def text_width(text: str, size_px: float) -> float:
    """About the width of a text in px, by the widest of the usual sans-serif fonts."""
    narrow, wide = "iljtfrI.,:;|!'()[] /", "mwMW%@→"
    return size_px * sum(0.37 if c in narrow else 0.9 if c in wide else 0.7 if c.isupper() else 0.62 for c in text)


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
        tints = dict.fromkeys(sorted({b.colour for b in picture.boxes} - _PHASE_COLOURS.keys()))
        others = {tint: _OTHER_COLOURS[n % len(_OTHER_COLOURS)] for n, tint in enumerate(tints)}
        self.colours = {**_PHASE_COLOURS, **others}
        self.taken = [self._rectangle(n) for n in range(len(items))]
        self.head = list(self.top())

    def text(self) -> str:
        width, height = self.right - self.left, self.bottom + _HEAD
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
            f'viewBox="{self.left:.1f} {-_HEAD:.1f} {width:.1f} {height:.1f}" font-family="{_FONT}">',
            "<defs>",
            *(_head(name, colour) for name, (colour, _) in _ARROWS.items()),
            "</defs>",
            f'<rect x="{self.left:.1f}" y="{-_HEAD:.1f}" width="{width:.1f}" height="{height:.1f}" fill="#ffffff"/>',
            *self.head,
            *(self.frame(c) for c in self.frames),
            *(self.arrow(edge) for edge in self.curves),
            *(part for n in range(len(self.items)) for part in self.box(n)),
            *self.labels(),
            "</svg>",
        ]
        return "\n".join(parts) + "\n"

    def top(self) -> Iterator[str]:
        """Title, legend and the headings of the blocks."""
        x = self.left + _MARGIN
        yield _text(x, 26 - _HEAD, self.picture.title, 15, "#0f172a", weight="600")
        if self.picture.note:
            yield _text(
                x + text_width(self.picture.title, 15) * _BOLD + 12, 26 - _HEAD, self.picture.note, 12, "#b45309"
            )
        y = 46 - _HEAD
        used = {box.colour for box in self.picture.boxes}
        for tint in [tint for tint in self.colours if tint in used]:
            fill, stroke = self.colours[tint]
            yield f'<rect x="{x:.1f}" y="{y - 9:.1f}" width="12" height="12" rx="3" fill="{fill}" stroke="{stroke}"/>'
            yield _text(x + 18, y + 1, tint, 11, "#334155")
            x += 32 + text_width(tint, 11)
        carried = {self.carries(edge) for edge in self.curves}
        for name in [name for name in _ARROWS if name in carried]:
            stroke, dashes = _ARROWS[name]
            yield (
                f'<path d="M{x:.1f},{y - 3:.1f} h22" stroke="{stroke}" stroke-width="1.8" fill="none"'
                f'{_dashed(dashes)} marker-end="url(#{_identity(name)})"/>'
            )
            label = "serves several variables" if name == "shared" else name
            yield _text(x + 32, y + 1, label, 11, "#334155")
            x += 48 + text_width(label, 11)
        self.right = max(self.right, x)
        for block, (left, right) in self.layout.blocks.items():
            yield _text((left + right) / 2, 76 - _HEAD, _HEADINGS[block], 13, "#475569", "middle", "600")

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
            + _text(left + 10, top + 15, frame.scope, 11, "#64748b", weight="600")
        )

    def carries(self, edge: Edge) -> str:
        """What an arrow stands for: a key of the legend."""
        a, b = (self.picture.boxes[n] for n in edge)
        if SHARED in (a.scope, b.scope):
            return "shared"
        if b.kind == Phase.UPDATE:
            return "gradients to the update" if a.kind == Phase.BACKWARD else "activations"
        if b.kind == Phase.BACKWARD:
            return "gradients" if a.kind == Phase.BACKWARD else "kept for the backward pass"
        return "activations"

    def arrow(self, edge: Edge) -> str:
        name = self.carries(edge)
        stroke, dashes = _ARROWS[name]
        size = self.picture.arrows[edge]
        # A factor of 1000 in bytes is one pixel.
        width = min(max(1.0, 1.0 + math.log10(max(size, 1) / 1024) / 3), 4.0)
        curve = self.curves[edge]
        path = f"M{_point(curve.pieces[0][0])}" + "".join(
            f" C{_point(b)} {_point(c)} {_point(d)}" for _, b, c, d in curve.pieces
        )
        source, target = (self.picture.boxes[n].title for n in edge)
        return (
            f'<path d="{path}" fill="none" stroke="{stroke}" stroke-width="{width:.2f}"{_dashed(dashes)} '
            f'marker-end="url(#{_identity(name)})"><title>{escape(source)} → {escape(target)}: '
            f"{human_bytes(size)}</title></path>"
        )

    def box(self, number: int) -> Iterator[str]:
        box, item = self.picture.boxes[number], self.items[number]
        fill, stroke = self.colours[box.colour]
        x, y, width, height = self._rectangle(number)
        radius = height / 2 if box.kind in (FEED, FETCH) else 7.0
        yield (
            f'<g><title>{escape(box.title)}\n{escape(box.details)}</title><rect x="{x:.1f}" y="{y:.1f}" '
            f'width="{width:.1f}" height="{height:.1f}" rx="{radius:.1f}" fill="{fill}" stroke="{stroke}"/>'
        )
        middle, baseline = x + item.width / 2, y + _PADDING + 10
        yield _text(middle, baseline, _clipped(box.title), 13, "#0f172a", "middle", "600")
        for line in box.lines:
            baseline += _LINE
            yield _text(middle, baseline, _clipped(line), 11, "#475569", "middle")
        yield "</g>"

    def labels(self) -> Iterator[str]:
        """The bytes of the arrows, where there is room; the others show theirs on hovering."""
        for edge, curve in self.curves.items():
            name = self.carries(edge)
            if name == "shared" or (not self.picture.by_module and name == "kept for the backward pass"):
                continue
            label = human_bytes(self.picture.arrows[edge])
            place = self._free_place(curve, text_width(label, 10) + 4)
            if place is not None:
                x, y, width, height = place
                yield (
                    f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="3" fill="#ffffff" '
                    f'fill-opacity="0.85"/>'
                ) + _text(x + width / 2, y + 10, label, 10, "#475569", "middle")

    def _free_place(self, curve: Curve, width: float) -> tuple[float, float, float, float] | None:
        for share in (0.5, 0.42, 0.58, 0.34, 0.66, 0.26, 0.74, 0.18, 0.82):
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


def _dashed(dashes: str) -> str:
    return f' stroke-dasharray="{dashes}"' if dashes else ""


def _identity(name: str) -> str:
    return "to-" + name.replace(" ", "-")


def _head(name: str, colour: str) -> str:
    return (
        f'<marker id="{_identity(name)}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0,0.8 L8,4 L0,7.2 z" fill="{colour}"/></marker>'
    )


def _text(
    x: float, y: float, content: str, size_px: int, colour: str, anchor: str = "start", weight: str = "400"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size_px}" font-weight="{weight}" fill="{colour}" '
        f'text-anchor="{anchor}">{escape(content)}</text>'
    )
