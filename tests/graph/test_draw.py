"""Pictures of graphs: valid SVG and dot, everything in them once, readable, and the same each time."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from millrace.errors import SettingError
from millrace.graph.draw import MOST_NODES, draw, picture_of
from millrace.graph.graph import Graph, info
from millrace.graph.passes.prune import prune
from millrace.graph.picture.contract import contract
from millrace.graph.picture.frames import frames
from millrace.graph.picture.picture import FEED, FETCH, Picture, module_picture, node_picture
from millrace.graph.scopes import scope_of
from millrace.graph.signature import Phase
from millrace.graph.sizes import human_bytes

from .programs import branch_graph, deep_graph, mlp_graph

SVG = "{http://www.w3.org/2000/svg}"
LEVELS = ["module", "node"]


def drawn(graph: Graph, folder: Path, **options: str) -> ElementTree.Element:
    path = folder / "step.svg"
    draw(graph, path, **options)  # type: ignore[arg-type]
    return ElementTree.fromstring(path.read_text(encoding="utf-8"))


def texts(svg: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in svg.iter(f"{SVG}text")]


def rectangles(svg: ElementTree.Element) -> Iterator[tuple[float, float, float, float]]:
    """The boxes: x, y, width, height."""
    for group in svg.iter(f"{SVG}g"):
        for box in group.iter(f"{SVG}rect"):
            yield tuple(float(box.get(key, "nan")) for key in ("x", "y", "width", "height"))  # type: ignore[misc]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("make", [mlp_graph, deep_graph, branch_graph])
def test_svg_is_well_formed_and_nothing_leaves_the_picture(make: type, level: str, tmp_path: Path) -> None:
    svg = drawn(make(), tmp_path, level=level)
    left, top, width, height = map(float, svg.get("viewBox", "").split())
    boxes = list(rectangles(svg))
    assert boxes
    for x, y, w, h in boxes:
        assert left <= x
        assert x + w <= left + width
        assert top <= y
        assert y + h <= top + height
    for path in svg.iter(f"{SVG}path"):
        numbers = [float(n) for n in re.findall(r"-?\d+\.?\d*", path.get("d", ""))]
        xs = numbers[::2] if "h" not in path.get("d", "") and path.get("fill") == "none" else []
        assert all(left - 1 <= x <= left + width + 1 for x in xs)


@pytest.mark.parametrize("level", LEVELS)
def test_boxes_and_labels_do_not_overlap(level: str, tmp_path: Path) -> None:
    svg = drawn(deep_graph(), tmp_path, level=level)
    labels = [
        tuple(float(r.get(key, "nan")) for key in ("x", "y", "width", "height"))
        for r in svg.iter(f"{SVG}rect")
        if r.get("fill-opacity") == "0.85"
    ]
    assert labels, "arrows carry their bytes"
    for a, b in itertools.combinations([*rectangles(svg), *labels], 2):
        apart = a[0] + a[2] <= b[0] or b[0] + b[2] <= a[0] or a[1] + a[3] <= b[1] or b[1] + b[3] <= a[1]
        assert apart, (a, b)


@pytest.mark.parametrize(("level", "suffix"), [("module", ".svg"), ("node", ".svg"), ("module", ".dot")])
def test_the_same_graph_gives_the_same_file(level: str, suffix: str, tmp_path: Path) -> None:
    files = [tmp_path / f"{n}{suffix}" for n in range(2)]
    for graph, file in zip((mlp_graph(), mlp_graph.__wrapped__()), files, strict=True):
        draw(graph, file, level=level)  # type: ignore[arg-type]
    assert files[0].read_text() == files[1].read_text()


def test_every_module_phase_feed_and_fetch_has_its_box(tmp_path: Path) -> None:
    graph = deep_graph()
    shown = texts(drawn(graph, tmp_path))
    for node in graph.nodes:
        if scope_of(node) not in ("", "*"):
            assert scope_of(node) in shown
    assert {"feed:0", "feed:1", "loss", "(step)", "(shared)", "forward ↓", "backward ↑", "update"} <= set(shown)


def test_every_node_has_its_box_at_node_level() -> None:
    graph = mlp_graph()
    picture = node_picture(graph, "phase")
    boxes = [box for box in picture.boxes if box.kind not in (FEED, FETCH)]
    assert len(boxes) == len(graph.nodes)
    assert sum("→" in line for box in boxes for line in box.lines) == len(graph.updates)


def test_backward_stands_beside_its_forward_box_and_runs_upwards() -> None:
    picture = module_picture(deep_graph(), "phase")
    rows = {(box.kind, box.scope): box.rank for box in picture.boxes}
    for (kind, scope), rank in rows.items():
        if kind in (Phase.BACKWARD, Phase.UPDATE) and scope not in ("", "*"):
            assert rank == rows[Phase.FORWARD, scope]
    for source, target in picture.arrows:
        a, b = picture.boxes[source], picture.boxes[target]
        if a.kind == b.kind == Phase.FORWARD:
            assert a.rank < b.rank
        if a.kind == b.kind == Phase.BACKWARD:
            assert a.rank > b.rank


def test_arrows_carry_the_bytes_of_distinct_values() -> None:
    graph = mlp_graph()
    picture = module_picture(graph, "phase")
    number = {(box.kind, box.scope or box.title): n for n, box in enumerate(picture.boxes)}
    hidden = 5 * 3 * 4
    assert picture.arrows[number[Phase.FORWARD, "0"], number[Phase.FORWARD, "1"]] == hidden
    assert picture.arrows[number[FEED, "feed:x"], number[Phase.FORWARD, "0"]] == 5 * 4 * 4
    # The activation goes on to the next layer, and is kept for two backward boxes.
    assert picture.arrows[number[Phase.FORWARD, "1"], number[Phase.BACKWARD, "1"]] == hidden
    assert picture.arrows[number[Phase.FORWARD, "1"], number[Phase.BACKWARD, "2"]] == hidden
    # Both gradients of a layer, a weight's and a bias's, go into its update.
    assert picture.arrows[number[Phase.BACKWARD, "0"], number[Phase.UPDATE, "0"]] == (4 * 3 + 3) * 4


def test_groups_are_acyclic_and_complete() -> None:
    graph = deep_graph()
    groups = contract(graph.nodes, lambda n: (info(n).phase, scope_of(n)))
    place = {node: number for number, group in enumerate(groups) for node in group}
    assert len(place) == sum(map(len, groups)) == len(graph.nodes)
    for node in graph.nodes:
        assert all(place[i] <= place[node] for i in node.all_input_nodes if i in place)
    for group in groups:
        assert len({(info(n).phase, scope_of(n)) for n in group}) == 1
    # A residual sum stands between what goes into it and what comes out: one step box per block, and the loss.
    steps = [g for g in groups if info(g[0]).phase is Phase.FORWARD and scope_of(g[0]) == ""]
    assert len(steps) == 4


def test_frames_hold_their_module_alone() -> None:
    picture = module_picture(deep_graph(), "phase")
    found = {frame.scope: frame for frame in frames(picture)}
    assert {"blocks.0", "blocks.1", "blocks.2"} <= found.keys()
    for scope, frame in found.items():
        inside = [box for box in picture.boxes if frame.first <= box.rank <= frame.last]
        assert all(box.scope.startswith(f"{scope}.") for box in inside)


@pytest.mark.parametrize(("colour", "expected"), [("device", {"cpu"}), ("dtype", {"f32", "f64", "i64"})])
def test_colours_tell_device_or_dtype(colour: str, expected: set[str], tmp_path: Path) -> None:
    picture = module_picture(deep_graph(), colour)  # type: ignore[arg-type]
    assert {box.colour for box in picture.boxes} == expected
    assert expected <= set(texts(drawn(deep_graph(), tmp_path, colour=colour)))


def test_large_graph_is_drawn_by_module_with_a_note(tmp_path: Path) -> None:
    graph = deep_graph(6)
    assert len(graph.nodes) > MOST_NODES
    shown = texts(drawn(graph, tmp_path, level="node"))
    assert any("drawn by module" in text for text in shown)
    assert "blocks.5.1" in shown


def test_pruned_graph_has_a_forward_part_only(tmp_path: Path) -> None:
    shown = texts(drawn(prune(mlp_graph(), ["loss"], []), tmp_path))
    assert "forward ↓" in shown
    assert "backward ↑" not in shown


def test_fetched_gradients_are_left_out_where_the_loss_is_shown() -> None:
    graph = mlp_graph()
    more = graph.with_(fetches={**graph.fetches, "gradient": "mm_1", "hidden": "relu"})
    picture: Picture = picture_of(more, "module", "phase")
    assert [box.title for box in picture.boxes if box.kind == FETCH] == ["loss", "hidden"]


def test_dot_names_every_box_and_arrow(tmp_path: Path) -> None:
    graph = mlp_graph()
    path = tmp_path / "step.dot"
    draw(graph, path)
    text, picture = path.read_text(), module_picture(graph, "phase")
    assert text.startswith("digraph step {")
    assert text.count("{") == text.count("}")
    assert len(re.findall(r"^ +n\d+ \[label", text, re.MULTILINE)) == len(picture.boxes)
    for (source, target), size in picture.arrows.items():
        assert f'n{source} -> n{target} [label="{human_bytes(size)}"];' in text


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    for path, options, match in (
        ("step.png", {}, "suffix"),
        ("step.svg", {"level": "modul"}, "'module'"),
        ("step.svg", {"colour": "color"}, "colour"),
    ):
        with pytest.raises(SettingError, match=match):
            draw(mlp_graph(), tmp_path / path, **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (10**6, "977 KiB"), (2**40 * 3, "3 TiB")],
)
def test_bytes_are_written_for_people(count: int, shown: str) -> None:
    assert human_bytes(count) == shown
