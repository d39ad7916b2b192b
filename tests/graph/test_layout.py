"""Laid-out pictures: nothing overlaps, rows and blocks are kept, arrows run where there is room."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.graph.picture.layout import Edge, Item, arrange, ranks
from millrace.graph.picture.routes import route

sizes = st.floats(20, 200)


@st.composite
def drawings(draw: st.DrawFn) -> tuple[list[Item], list[Edge]]:
    count = draw(st.integers(1, 12))
    items = [Item(draw(sizes), draw(sizes), draw(st.integers(0, 2)), draw(st.integers(0, 5))) for _ in range(count)]
    pairs = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1))
    edges = draw(st.lists(pairs.filter(lambda e: e[0] != e[1]), max_size=20, unique=True))
    return items, edges


@settings(deadline=None, max_examples=60)
@given(drawings())
def test_boxes_keep_apart_and_stay_in_row_and_block(drawing: tuple[list[Item], list[Edge]]) -> None:
    items, edges = drawing
    layout = arrange(items, edges, gap=10, row_gap=20, block_gap=50)
    for n, (item, (x, y)) in enumerate(zip(items, layout.centres, strict=True)):
        row, (left, right) = layout.rows[item.rank], layout.blocks[item.block]
        assert row.top - 1e-6 <= y - item.height / 2
        assert y + item.height / 2 <= row.bottom + 1e-6
        assert left - 1e-6 <= x - item.width / 2
        assert x + item.width / 2 <= right + 1e-6
        for other, (ox, _) in list(zip(items, layout.centres, strict=True))[n + 1 :]:
            if (item.block, item.rank) == (other.block, other.rank):
                assert abs(x - ox) >= (item.width + other.width) / 2 + 10 - 1e-6
    spans = [layout.blocks[b] for b in sorted(layout.blocks)]
    assert all(b[0] - a[1] >= 50 - 1e-6 for a, b in itertools.pairwise(spans))
    assert all(b.top - a.bottom >= 20 - 1e-6 for a, b in itertools.pairwise(layout.rows))


@settings(deadline=None, max_examples=60)
@given(drawings())
def test_lanes_pass_every_row_between_and_no_box(drawing: tuple[list[Item], list[Edge]]) -> None:
    items, edges = drawing
    layout = arrange(items, edges)
    for (a, b), lanes in layout.lanes.items():
        low, high = sorted((items[a].rank, items[b].rank))
        between = range(low + 1, high)
        assert len(lanes) == len(between)
        for rank, x in zip(between if items[a].rank < items[b].rank else reversed(between), lanes, strict=True):
            for item, (cx, _) in zip(items, layout.centres, strict=True):
                if (item.block, item.rank) == (items[a].block, rank):
                    assert abs(x - cx) >= item.width / 2


@settings(deadline=None, max_examples=60)
@given(drawings(), st.booleans())
def test_arrows_join_their_boxes(drawing: tuple[list[Item], list[Edge]], hub: bool) -> None:
    items, edges = drawing
    layout = arrange(items, edges)
    curves = route(items, edges, layout, frozenset({0}) if hub else frozenset())
    assert list(curves) == edges
    for edge, curve in curves.items():
        for number, (x, y) in zip(edge, (curve.at(0.0), curve.at(1.0)), strict=True):
            cx, cy = layout.centres[number]
            across, down = abs(x - cx) - items[number].width / 2, abs(y - cy) - items[number].height / 2
            assert abs(max(across, down)) < 1e-6, "an arrow begins and ends on the border of its box"
        ends = [(piece[0], piece[-1]) for piece in curve.pieces]
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ends)), "the pieces are joined"


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(lambda e: e[0] < e[1]), unique=True))
def test_ranks_grow_along_every_edge(edges: list[Edge]) -> None:
    rank = ranks(10, edges)
    assert all(rank[a] < rank[b] for a, b in edges)
    assert min(rank) >= 0
    for item in range(10):
        longest = max((rank[a] + 1 for a, b in edges if b == item), default=None)
        nearest = min((rank[b] - 1 for a, b in edges if a == item), default=0)
        assert rank[item] == (nearest if longest is None else longest)


def test_a_chain_is_straight_and_a_detour_goes_around() -> None:
    items = [Item(100, 40, 0, rank) for rank in range(4)]
    layout = arrange(items, [(0, 1), (1, 2), (2, 3), (0, 3)])
    x = [centre[0] for centre in layout.centres]
    assert max(x[1:3]) - min(x[1:3]) < 1
    lanes = layout.lanes[0, 3]
    assert all(abs(lane - x[1]) > 50 for lane in lanes)
    assert max(lanes) - min(lanes) < 1


def test_crossings_are_untangled() -> None:
    # Two pairs joined crosswise can be drawn without a crossing by swapping one row.
    items = [Item(50, 20, 0, rank) for rank in (0, 0, 0, 1, 1, 1)]
    layout = arrange(items, [(0, 5), (1, 4), (2, 3)])
    top, bottom = layout.centres[:3], layout.centres[3:]
    assert [sorted(top).index(c) for c in top] == [sorted(bottom).index(c) for c in reversed(bottom)]


def test_straight_columns_stay_straight() -> None:
    items = [Item(50 + 30 * (n % 2), 20, 0, n // 2) for n in range(8)]
    layout = arrange(items, [(n, n + 2) for n in range(6)])
    for column in (0, 1):
        x = [layout.centres[n][0] for n in range(column, 8, 2)]
        assert max(x) - min(x) < 1
