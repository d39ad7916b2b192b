"""The colours of a picture."""

from __future__ import annotations

from collections.abc import Mapping

from millrace.graph.picture.picture import FEED, FETCH, VARIABLE, Picture
from millrace.graph.signature import Phase

Paint = tuple[str, str]  # fill, stroke

_PHASES: Mapping[str, Paint] = {
    FEED: ("#f1f5f9", "#64748b"),
    VARIABLE: ("#f1f5f9", "#64748b"),
    str(Phase.FORWARD): ("#dbeafe", "#2563eb"),
    str(Phase.BACKWARD): ("#ffedd5", "#ea580c"),
    str(Phase.UPDATE): ("#dcfce7", "#16a34a"),
    FETCH: ("#fef9c3", "#a16207"),
}
_OTHERS: tuple[Paint, ...] = (
    ("#dbeafe", "#2563eb"),
    ("#ffedd5", "#ea580c"),
    ("#dcfce7", "#16a34a"),
    ("#f3e8ff", "#9333ea"),
    ("#ffe4e6", "#e11d48"),
    ("#cffafe", "#0891b2"),
    ("#fef9c3", "#a16207"),
    ("#e2e8f0", "#475569"),
)
# Fills under black text that people with the usual deficiencies of colour vision can tell apart: the "light" scheme of
# Paul Tol, "Colour Schemes" (SRON/EPS/TN/09-002, 2021). The strokes are the same, darker.
DEVICES: tuple[Paint, ...] = (
    ("#77AADD", "#33639a"),
    ("#EE8866", "#a8472a"),
    ("#EEDD88", "#95832c"),
    ("#44BB99", "#1d6f58"),
    ("#FFAABB", "#b25a6e"),
    ("#BBCC33", "#6c7a0e"),
    ("#99DDFF", "#3c88ad"),
    ("#AAAA00", "#626200"),
)
_ELSEWHERE: Paint = ("#ffffff", "#64748b")  # in a placed graph: feeds and fetches, which are the caller's


def paints_of(picture: Picture) -> dict[str, Paint]:
    """The fill and stroke of everything that a box's colour may stand for. More devices than colours share some."""
    if picture.devices:
        devices = {device: DEVICES[n % len(DEVICES)] for n, device in enumerate(picture.devices)}
        return {**dict.fromkeys((FEED, FETCH), _ELSEWHERE), **devices}
    tints = dict.fromkeys(sorted({b.colour for b in picture.boxes} - _PHASES.keys()))
    return {**_PHASES, **{tint: _OTHERS[n % len(_OTHERS)] for n, tint in enumerate(tints)}}
