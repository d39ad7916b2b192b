"""The page about simulated scaling: made whole from a small run, from given costs, the same every time."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from bench.charts import line_chart
from bench.scale import main
from bench.scale_costs import Costs

COSTS = Costs(0.01, 200_000, 64, 0.5, 15_000_000, 16, 1e-10, 5e-10, 1e-5)


def test_a_small_run_writes_page_figures_and_pictures(tmp_path: Path) -> None:
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps(COSTS.as_dict()))
    pages = []
    for name in ("one", "other"):
        out = tmp_path / name
        given = [
            "--costs",
            str(costs),
            "--most",
            "8",
            "--no-paper",
            "--out",
            str(out),
            "--results",
            str(out / "r.json"),
        ]
        assert main(given) == 0
        pages.append((out / "scale.md").read_text())
    assert pages[0] == pages[1]
    kept = json.loads((tmp_path / "one" / "r.json").read_text())
    assert kept["costs"]["transformer_s"] == COSTS.transformer_s
    ways = kept["cases"]["digits/fast"]["ways"]
    assert ways["async"]["by_workers"]["8"]["examples_per_s"] == pytest.approx(8 * 64 / 0.01, rel=0.1)
    assert kept["cases"]["inception/slow"]["servers_needed"]["servers"]["8"] >= 4
    assert "## transformer, slow network" in pages[0]
    ET.parse(tmp_path / "one" / "scale-inception-slow.svg")


def test_a_chart_has_a_line_and_a_name_for_each_series() -> None:
    text = line_chart("A < B", "x", "y", {"one & two": [(1, 1), (10, 100)], "flat": [(1, 5), (10, 5)]})
    root = ET.fromstring(text)
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"A < B", "one & two", "flat"} <= set(texts)
    assert len([e for e in root.iter() if e.get("fill") == "none"]) == 2
    below = ET.fromstring(line_chart("b", "x", "y", {"gain": [(0, 0.0), (3, 9.5), (5, -2.0)]}, log=False))
    assert any(element.text == "-2" for element in below.iter())
