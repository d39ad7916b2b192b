"""Graphs as text: the golden files are what a person reads; delete one and run the test to write it anew."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from millrace.graph.graph import Graph
from millrace.graph.passes.prune import prune
from millrace.graph.signature import Role
from millrace.graph.summary import summary
from millrace.graph.text import to_text

from .programs import branch_graph, deep_graph, mlp_graph

GOLDEN = Path(__file__).parent / "golden"


def matches_golden(text: str, name: str) -> None:
    """Compare with the golden file; a missing one is written, and the test fails once."""
    path = GOLDEN / name
    if not path.exists():
        path.write_text(text + "\n", encoding="utf-8")
        pytest.fail(f"{path} is new: look at it and commit it")
    assert text + "\n" == path.read_text(encoding="utf-8")


def test_mlp_reads_as_agreed() -> None:
    matches_golden(to_text(mlp_graph()), "mlp_sgd.txt")


def test_branch_reads_as_agreed() -> None:
    matches_golden(to_text(branch_graph()), "branch.txt")


def test_summary_reads_as_agreed() -> None:
    matches_golden(summary(deep_graph(2)), "deep_summary.txt")


def test_print_shows_the_text() -> None:
    graph = mlp_graph()
    assert str(graph) == to_text(graph)


def test_lines_add_the_users_source_and_nothing_else() -> None:
    graph = mlp_graph()
    with_lines = to_text(graph, lines=True).splitlines()
    assert [line.split("  # ")[0] for line in with_lines] == to_text(graph).splitlines()
    assert any("programs.py" in line and " in step" in line for line in with_lines)


def test_every_node_variable_feed_and_result_is_in_the_text() -> None:
    graph = deep_graph()
    text = to_text(graph)
    lines = text.splitlines()
    for node in graph.nodes:
        assert sum(line.startswith(f"  %{node.name} = ") for line in lines) == 1
    for variable in graph.variables:
        updated = variable.name in graph.updates
        row = next(line.split() for line in lines if line.startswith(f"  {variable.name} "))
        assert (row[-1] == "updated") is updated
    for name, node in graph.updates.items():
        assert f"  {name} = %{node}" in lines
        assert any(line.startswith(f"  %{node} = ") and f"-> {name}" in line for line in lines)
    assert f"  loss = %{graph.fetches['loss']}" in lines
    assert all(f"  feed:{feed.name} " in text for feed in graph.feeds)


def test_pruned_graph_prints_only_what_is_left() -> None:
    text = to_text(prune(mlp_graph(), ["loss"], []))
    assert "backward" not in text
    assert "update " not in text


def totals(graph: Graph) -> list[str]:
    return re.split(r"  +", summary(graph).splitlines()[-1])


def test_summary_counts_every_node_and_parameter_once() -> None:
    graph = deep_graph(4)
    row = totals(graph)
    parameters = [v for v in graph.variables if v.role is Role.PARAMETER]
    assert row[1] == f"{sum(math.prod(p.spec.shape) for p in parameters):,}"
    assert sum(int(cell) for cell in row[2:] if cell.isdigit()) == len(graph.nodes)


def test_summary_fits_on_the_rows_it_is_given() -> None:
    graph = deep_graph(6)
    for rows in (6, 12, 30):
        assert len(summary(graph, rows=rows).splitlines()) <= rows + 5
    assert totals(graph)[1:] == re.split(r"  +", summary(graph, rows=6).splitlines()[-1])[1:]
    assert "blocks.5.1" in summary(graph, rows=40)
