"""Pictures of placed graphs: every box in the colour of its device, and what goes between devices with its bytes."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from millrace.graph.draw import draw, picture_of
from millrace.graph.graph import Graph, info
from millrace.graph.picture.colours import DEVICES
from millrace.graph.picture.picture import FEED, FETCH, VARIABLE, Picture
from millrace.graph.places import Places, crossings
from millrace.graph.scopes import scope_of
from millrace.graph.sizes import human_bytes, value_bytes

from .programs import deep_graph, mlp_graph

SVG = "{http://www.w3.org/2000/svg}"
ONE, TWO = "/host:0/gpu:0", "/host:0/gpu:1"
NOTES = {ONE: "61% busy, 1.2 GiB of 16 GiB", TWO: "48% busy, 1 GiB of 16 GiB"}


def by_module(graph: Graph, *second: str) -> Places:
    """Modules that begin with one of `second` on the second device, all else on the first."""
    nodes = {n.name: TWO if scope_of(n).startswith(second) else ONE for n in graph.nodes}
    variables = {v.name: TWO if v.name.startswith(second) else ONE for v in graph.variables}
    return Places(nodes, variables, NOTES, "expected: 3 ms a step")


def drawn(graph: Graph, places: Places, folder: Path, level: str = "module") -> ElementTree.Element:
    draw(graph, folder / "step.svg", level=level, places=places)  # type: ignore[arg-type]
    return ElementTree.fromstring((folder / "step.svg").read_text(encoding="utf-8"))


def texts(svg: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in svg.iter(f"{SVG}text")]


@pytest.mark.parametrize("level", ["module", "node"])
def test_boxes_have_the_colour_that_the_legend_gives_their_device(level: str, tmp_path: Path) -> None:
    graph = mlp_graph()
    places = by_module(graph, "2")
    svg = drawn(graph, places, tmp_path, level)
    shown = list(svg.iter())
    samples = {}  # the legend: a square, then the name of the device, then what is said of it
    for square, name, note in zip(shown, shown[1:], shown[2:], strict=False):
        if square.tag == f"{SVG}rect" and name.text in NOTES:
            samples[name.text] = square.get("fill")
            assert note.text == NOTES[name.text]
    assert list(samples) == [ONE, TWO]
    assert len(set(samples.values())) == 2
    picture = picture_of(graph, level, "phase", places)  # type: ignore[arg-type]
    groups = list(svg.iter(f"{SVG}g"))
    assert len(groups) == len(picture.boxes)
    for box, group in zip(picture.boxes, groups, strict=True):
        rectangle = group.find(f"{SVG}rect")
        assert rectangle is not None
        if box.kind in (FEED, FETCH):
            assert rectangle.get("fill") not in samples.values()
        else:
            assert rectangle.get("fill") == samples[box.device]
            assert any(text.endswith(box.device[-5:]) for text in texts(group))  # not by the colour alone
    assert "expected: 3 ms a step" in texts(svg)


def test_a_module_on_two_devices_is_two_boxes() -> None:
    graph = deep_graph()
    places = by_module(graph, "blocks.1")
    half = {n.name: TWO for n in graph.nodes if scope_of(n) == "blocks.1.1"}
    some = dict(itertools.islice(half.items(), len(half) // 2))
    picture = picture_of(graph, "module", "phase", Places({**places.nodes, **dict.fromkeys(some, ONE)}, {}, NOTES))
    count = 0
    for box in picture.boxes:
        if box.scope == "blocks.1.1":
            count += 1
            assert box.device in NOTES
    assert {b.device for b in picture.boxes if b.scope == "blocks.1.1"} == {ONE, TWO}
    assert count > len({(b.kind) for b in picture.boxes if b.scope == "blocks.1.1"})


def crossing_paths(svg: ElementTree.Element, picture: Picture) -> list[tuple[ElementTree.Element, int]]:
    """The arrows between devices, with their bytes."""
    said = {}
    for edge, size in picture.arrows.items():
        if picture.crosses(edge):
            source, target = (picture.boxes[n].title for n in edge)
            said[f"{source} → {target}: {human_bytes(size)}"] = size
    return [
        (path, said[title.text or ""])
        for path in svg.iter(f"{SVG}path")
        if (title := path.find(f"{SVG}title")) is not None and title.text in said
    ]


def test_arrows_between_devices_stand_out_and_say_their_bytes(tmp_path: Path) -> None:
    graph = deep_graph()
    places = by_module(graph, "blocks.1")
    svg, picture = drawn(graph, places, tmp_path), picture_of(graph, "module", "phase", places)
    between = crossing_paths(svg, picture)
    assert len(between) == sum(map(picture.crosses, picture.arrows)) > 0
    others = [
        p for p in svg.iter(f"{SVG}path") if p.find(f"{SVG}title") is not None and all(p is not q for q, _ in between)
    ]
    assert {p.get("stroke") for p, _ in between}.isdisjoint({p.get("stroke") for p in others})
    bold = [e.text for e in svg.iter(f"{SVG}text") if e.get("font-weight") == "700"]
    assert sorted(bold, key=str) == sorted((human_bytes(size) for _, size in between), key=str)
    assert {"within a device", "between devices"} <= set(texts(svg))


def test_labels_do_not_overlap_boxes_or_each_other(tmp_path: Path) -> None:
    graph = deep_graph()
    svg = drawn(graph, by_module(graph, "blocks.1"), tmp_path)
    boxes = [r for g in svg.iter(f"{SVG}g") for r in g.iter(f"{SVG}rect")]
    labels = [r for r in svg.iter(f"{SVG}rect") if r.get("fill-opacity") == "0.85"]
    every = [tuple(float(r.get(key, "nan")) for key in ("x", "y", "width", "height")) for r in boxes + labels]
    left, top, width, height = map(float, svg.get("viewBox", "").split())
    for a, b in itertools.combinations(every, 2):
        assert a[0] + a[2] <= b[0] or b[0] + b[2] <= a[0] or a[1] + a[3] <= b[1] or b[1] + b[3] <= a[1], (a, b)
    for x, y, w, h in every:
        assert left <= x <= x + w <= left + width
        assert top <= y <= y + h <= top + height
    head = [(float(e.get("x", "nan")), float(e.get("y", "nan"))) for e in svg.iter(f"{SVG}text") if e.text in NOTES]
    assert all(y < min(box[1] for box in every) for _, y in head)


def test_a_variable_that_another_device_reads_has_a_box_and_no_view_crosses(tmp_path: Path) -> None:
    graph = mlp_graph()
    where = {n.name: ONE if info(n).phase == "forward" else TWO for n in graph.nodes}
    places = Places(where, {v.name: TWO for v in graph.variables}, NOTES)
    picture = picture_of(graph, "module", "phase", places)
    boxes = {box.title: box for box in picture.boxes if box.kind == VARIABLE}
    sent = {name: node for name, node in graph.placeholders().items() if (node, ONE) in crossings(graph, places)}
    assert boxes.keys() == sent.keys() != set()
    for (source, target), size in picture.arrows.items():
        box = picture.boxes[source]
        if box.kind == VARIABLE:
            assert (box.device, picture.boxes[target].device) == (TWO, ONE)
            assert size == value_bytes(sent[box.title].meta["val"])


def test_dot_tells_devices_as_well(tmp_path: Path) -> None:
    graph = mlp_graph()
    places = by_module(graph, "2")
    draw(graph, tmp_path / "step.dot", places=places)
    text, picture = (tmp_path / "step.dot").read_text(), picture_of(graph, "module", "phase", places)
    for device, (fill, _) in zip(NOTES, DEVICES, strict=False):
        assert text.count(f'fillcolor="{fill}"') == sum(box.device == device for box in picture.boxes)
        assert f"{device}: {NOTES[device]}" in text
    assert len(re.findall(r"style=bold", text)) == sum(map(picture.crosses, picture.arrows))


def test_more_devices_than_colours_are_told_apart_by_their_names(tmp_path: Path) -> None:
    graph = deep_graph()
    names = [f"/host:0/gpu:{index}" for index in range(len(DEVICES) + 2)]
    nodes = {node.name: names[index % len(names)] for index, node in enumerate(graph.nodes)}
    shown = texts(drawn(graph, Places(nodes, {}, dict.fromkeys(names, "")), tmp_path))
    assert set(names) <= set(shown)
    assert any(text.endswith("gpu:9") for text in shown if text not in names)


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.1)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_texts_in_boxes_can_be_read(tmp_path: Path) -> None:
    graph = deep_graph()
    names = [f"/host:0/gpu:{index}" for index in range(len(DEVICES))]
    nodes = {node.name: names[index % len(names)] for index, node in enumerate(graph.nodes)}
    svg = drawn(graph, Places(nodes, {}, dict.fromkeys(names, "")), tmp_path)
    for group in svg.iter(f"{SVG}g"):
        rectangle = group.find(f"{SVG}rect")
        assert rectangle is not None
        paper = luminance(rectangle.get("fill", ""))
        for text in group.iter(f"{SVG}text"):
            ink = luminance(text.get("fill", ""))
            assert (paper + 0.05) / (ink + 0.05) >= 4.5  # level AA
