"""The head of a picture: its title, and what colours and arrows mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from millrace.graph.picture.colours import Paint
from millrace.graph.picture.elements import dashed, head_identity, text_at, text_width
from millrace.graph.picture.picture import Picture

_DEVICE_ROW = 19.0
_BOLD = 1.1  # how much wider bold letters are
# what an arrow carries -> stroke, dashes
ARROWS: Mapping[str, tuple[str, str]] = {
    "activations": ("#64748b", ""),
    "kept for the backward pass": ("#94a3b8", "5 4"),
    "gradients": ("#ea580c", ""),
    "gradients to the update": ("#16a34a", ""),
    "within a device": ("#b6c0cd", ""),
    "between devices": ("#0f172a", ""),
    "shared": ("#cbd5e1", ""),
}


@dataclass
class Legend:
    """What stands above a picture. parts: in SVG. right: the x where they end. bottom: the y below the last."""

    parts: list[str] = field(default_factory=list)
    right: float = 0.0
    bottom: float = 0.0

    def text(self, x: float, y: float, content: str, size_px: int, colour: str, weight: str = "400") -> float:
        """Add a text; returns the x where it ends."""
        self.parts.append(text_at(x, y, content, size_px, colour, weight=weight))
        end = x + text_width(content, size_px) * (_BOLD if weight != "400" else 1.0)
        self.right = max(self.right, end)
        return end

    def square(self, x: float, y: float, paint: Paint) -> None:
        """Add a sample of a colour."""
        fill, stroke = paint
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="12" height="12" rx="3" fill="{fill}" stroke="{stroke}"/>'
        )


def legend(picture: Picture, paints: Mapping[str, Paint], carried: Sequence[str], x: float, y: float) -> Legend:
    """The head of a picture, whose left upper corner is at x, y. Args: carried: the kinds of arrows that are there."""
    made = Legend()
    end = made.text(x, y, picture.title, 15, "#0f172a", "600")
    if picture.note:
        made.text(end + 12, y, picture.note, 12, "#b45309")
    if picture.summary:
        y += 19
        made.text(x, y, picture.summary, 12, "#334155")
    y += 20
    for device, note in picture.devices.items():
        made.square(x, y - 9, paints[device])
        made.text(x + 18, y + 1, device, 12, "#0f172a", "600")
        widest = max(text_width(name, 12) for name in picture.devices) * _BOLD
        made.text(x + 18 + widest + 14, y + 1, note, 12, "#334155")
        y += _DEVICE_ROW
    used = {box.colour for box in picture.boxes}
    for tint in [tint for tint in paints if tint in used and not picture.devices]:
        made.square(x, y - 9, paints[tint])
        x = made.text(x + 18, y + 1, tint, 11, "#334155") + 14
    for name in [name for name in ARROWS if name in carried]:
        stroke, dashes = ARROWS[name]
        made.parts.append(
            f'<path d="M{x:.1f},{y - 3:.1f} h22" stroke="{stroke}" stroke-width="1.8" fill="none"'
            f'{dashed(dashes)} marker-end="url(#{head_identity(name)})"/>'
        )
        label = "serves several variables" if name == "shared" else name
        x = made.text(x + 32, y + 1, label, 11, "#334155") + 16
    made.right, made.bottom = max(made.right, x), y + 12
    return made
