"""Pieces of SVG text, and how wide text becomes."""

from __future__ import annotations

from html import escape


def text_width(text: str, size_px: float) -> float:
    """About the width of a text in px, by the widest of the usual sans-serif fonts."""
    narrow, wide = "iljtfrI.,:;|!'()[] /", "mwMW%@→"
    return size_px * sum(0.37 if c in narrow else 0.9 if c in wide else 0.7 if c.isupper() else 0.62 for c in text)


def text_at(
    x: float, y: float, content: str, size_px: int, colour: str, anchor: str = "start", weight: str = "400"
) -> str:
    """A line of text; x and y are where its baseline begins, or its middle or end by `anchor`."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size_px}" font-weight="{weight}" fill="{colour}" '
        f'text-anchor="{anchor}">{escape(content)}</text>'
    )


def dashed(dashes: str) -> str:
    """The attribute for a dashed line; "" for a whole one."""
    return f' stroke-dasharray="{dashes}"' if dashes else ""


def head_identity(name: str) -> str:
    """What the head of one kind of arrow is called in the file."""
    return "to-" + name.replace(" ", "-")


def arrow_head(name: str, colour: str) -> str:
    """The definition of the head of one kind of arrow."""
    return (
        f'<marker id="{head_identity(name)}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0,0.8 L8,4 L0,7.2 z" fill="{colour}"/></marker>'
    )
