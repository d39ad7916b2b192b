"""A graph as a picture in a file: SVG, or the text that Graphviz reads. Needs nothing installed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from millrace.errors import SettingError, did_you_mean
from millrace.graph.graph import Graph
from millrace.graph.picture.colours import paints_of
from millrace.graph.picture.picture import Colour, Picture, module_picture, node_picture
from millrace.graph.picture.svg import to_svg
from millrace.graph.places import Places
from millrace.graph.signature import Phase
from millrace.graph.sizes import human_bytes

Level = Literal["module", "node"]
MOST_NODES = 300  # more boxes than that no one can read


def draw(
    graph: Graph,
    path: str | os.PathLike[str],
    *,
    level: Level = "module",
    colour: Colour = "phase",
    places: Places | None = None,
) -> None:
    """Draw `graph` into a file: forward on the left, backward beside it, the update on the right.

    Args:
        path: ends in .svg, or in .dot for Graphviz.
        level: "module" for a box per module and phase, "node" for a box per node; a graph of more than 300 nodes is
            drawn by module in either case, and the picture says so.
        colour: what the boxes' colours tell: "phase", "device" or "dtype".
        places: which device runs what, where the graph is placed: boxes are coloured by it, whatever `colour` says, and
            arrows between devices stand out.

    Raises: SettingError for another suffix, level or colour. OSError when the file cannot be written.
    """
    writers = {".svg": to_svg, ".dot": to_dot}
    path = Path(path)
    _known("the suffix of a picture", path.suffix, list(writers))
    _known("level", level, list(get_args(Level)))
    _known("colour", colour, list(get_args(Colour)))
    path.write_text(writers[path.suffix](picture_of(graph, level, colour, places)), encoding="utf-8")


def picture_of(graph: Graph, level: Level, colour: Colour, places: Places | None = None) -> Picture:
    """What `draw` shows: by node if it is asked for and readable, else by module."""
    if level == "module":
        return module_picture(graph, colour, places)
    if len(graph.nodes) <= MOST_NODES:
        return node_picture(graph, colour, places)
    note = f"drawn by module: more than {MOST_NODES} nodes"
    return replace(module_picture(graph, colour, places), note=note)


def to_dot(picture: Picture) -> str:
    """The picture in the language of Graphviz, one cluster per phase."""
    return "\n".join(["digraph step {", *_dot_lines(picture), "}"]) + "\n"


def _dot_lines(picture: Picture) -> Iterator[str]:
    paints = paints_of(picture)
    devices = [f"{device}: {note}" for device, note in picture.devices.items()]
    lines = [" ".join(filter(None, [picture.title, picture.note])), *filter(None, [picture.summary]), *devices]
    yield f"  label={_quoted(chr(10).join(lines))};"
    yield '  node [shape=box, style="rounded,filled", fillcolor=white, fontname="Helvetica"];'
    for kind in dict.fromkeys(box.kind for box in picture.boxes):
        inside = kind in set(Phase)
        if inside:
            yield f"  subgraph cluster_{kind} {{\n    label={kind};"
        for number, box in enumerate(picture.boxes):
            if box.kind == kind:
                label = _quoted("\n".join([box.title, *box.lines]))
                fill = f', fillcolor="{paints[box.colour][0]}"' if box.device else ""
                yield f"  {'  ' * inside}n{number} [label={label}, tooltip={_quoted(box.details)}{fill}];"
        if inside:
            yield "  }"
    for (source, target), size_bytes in picture.arrows.items():
        style = ", style=bold" if picture.crosses((source, target)) else ""
        yield f"  n{source} -> n{target} [label={_quoted(human_bytes(size_bytes))}{style}];"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _known(what: str, given: str, known: list[str]) -> None:
    if given not in known:
        raise SettingError(f"{what}: got {given!r}. {did_you_mean(given, known)}")
