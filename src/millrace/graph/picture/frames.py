"""The frames around boxes: which modules of a picture have rows to themselves."""

from __future__ import annotations

from dataclasses import dataclass

from millrace.graph.picture.picture import Box, Picture
from millrace.graph.scopes import SHARED


@dataclass(frozen=True)
class Frame:
    """A frame around the rows `first`..`last` of some blocks: a module that holds what stands there."""

    scope: str
    first: int
    last: int
    blocks: tuple[int, ...]
    level: int


def frames(picture: Picture) -> list[Frame]:
    """The modules whose boxes have their rows to themselves, outermost first."""
    blocks = sorted({box.block for box in picture.boxes})
    together = [tuple(blocks)] if picture.by_module else [(block,) for block in blocks]
    found: list[Frame] = []
    for group in together:
        boxes = [b for b in picture.boxes if b.block in group]
        parents = {".".join(b.scope.split(".")[:n]) for b in boxes for n in range(1, b.scope.count(".") + 2)}
        for scope in sorted(parents - {"", SHARED}, key=lambda s: (s.count("."), s)):
            rows = sorted({b.rank for b in boxes if _inside(b, scope)})
            inside = [b for b in boxes if rows[0] <= b.rank <= rows[-1]]
            several = len(rows) > 1 and (len({b.scope for b in inside}) > 1 or not picture.by_module)
            same = any(c.blocks == group and (c.first, c.last) == (rows[0], rows[-1]) for c in found)
            if several and not same and all(_inside(b, scope) for b in inside):
                level = sum(scope.startswith(f"{c.scope}.") for c in found if c.blocks == group)
                found.append(Frame(scope, rows[0], rows[-1], group, level))
    return found


def _inside(box: Box, scope: str) -> bool:
    return box.scope == scope or box.scope.startswith(f"{scope}.")
