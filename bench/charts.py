"""Line charts as SVG text, with logarithmic axes where asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 210, 40, 50
_NAMED = 12  # so many places on the x axis, or points of a line, are shown each
_COLOURS = ("#1f5fa8", "#d1662a", "#2b8a57", "#8a4fa3", "#b8860b", "#c0392b", "#16858f", "#6b6b6b")


def line_chart(title: str, x_label: str, y_label: str, lines: Mapping[str, Points], *, log: bool = True) -> str:
    """One line for each name, which stands beside its colour on the right. The same lines give the same text."""
    xs, ys = zip(*(point for points in lines.values() for point in points), strict=True)
    x_of = _scale(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT, log)
    low = min(ys) if log else min(ys) - 0.1 * (max(ys) - min(ys))
    y_of = _scale(low, max(ys), _HEIGHT - _BOTTOM, _TOP, log)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="Helvetica, Arial, '
        f'sans-serif" font-size="12"><rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        _text(_LEFT, 22, title, size=15),
        _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 10, x_label, anchor="middle"),
        _text(_LEFT, _TOP - 6, y_label, size=11),
    ]
    for x in sorted(set(xs)) if len(set(xs)) <= _NAMED else _ticks(min(xs), max(xs), log):
        parts.append(f'<path d="M{x_of(x):.1f} {_TOP}V{_HEIGHT - _BOTTOM}" stroke="#eee"/>')
        parts.append(_text(x_of(x), _HEIGHT - _BOTTOM + 17, f"{x:g}", anchor="middle"))
    for y in _ticks(low, max(ys), log):
        parts.append(f'<path d="M{_LEFT} {y_of(y):.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>')
        parts.append(_text(_LEFT - 8, y_of(y) + 4, f"{y:g}" if y < 1e4 else f"{y:.0e}", anchor="end"))
    for number, (name, points) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        path = "L".join(f"{x_of(x):.1f} {y_of(y):.1f}" for x, y in points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(points) <= _NAMED:
            parts.extend(f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3" fill="{colour}"/>' for x, y in points)
        at = _TOP + 14 + 20 * number
        parts.append(f'<path d="M{_WIDTH - _RIGHT + 16} {at - 4}h20" stroke="{colour}" stroke-width="3"/>')
        parts.append(_text(_WIDTH - _RIGHT + 42, at, name))
    return "\n".join([*parts, "</svg>\n"])


def _scale(low: float, high: float, begin: float, end: float, log: bool) -> Callable[[float], float]:
    f = math.log if log else float
    span = (f(high) - f(low)) or 1.0
    return lambda value: begin + (f(value) - f(low)) / span * (end - begin)


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        return [10.0**n for n in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step *= next(m for m in (1, 2, 5) if (high - low) / (m * step) <= 8)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f'<text {place} fill="#222">{escape(text)}</text>'
