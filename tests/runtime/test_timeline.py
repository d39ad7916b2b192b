"""A measured step becomes the same kind of picture as an expected one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.place.test_placement import cluster, placed, towers

from millrace.partition.placed import Planner
from millrace.place.chrome_trace import expected_spans, write_trace
from millrace.place.placement import follow
from millrace.runtime.placed_session import PlacedSession
from millrace.runtime.thread_workers import ThreadWorkers
from millrace.runtime.timeline import compared, measured_spans


def test_expected_and_measured_steps_have_the_same_rows(tmp_path: Path) -> None:
    graph, two = towers(), cluster(2)
    planner = Planner(lambda whole: placed(whole, two, {"left": "cpu:0", "right": "cpu:1", "head": "cpu:1"}))
    workers = ThreadWorkers([device.name for device in two.devices])
    with PlacedSession(graph, planner, workers, compile="eager", timeout_s=30.0) as session:
        session.watch_time = True
        session.run(["train", "loss"], (torch.randn(8, 32).double(), torch.zeros(8, dtype=torch.int64)))
        assert session.timeline is not None
        measured = measured_spans(session.timeline)
    assert planner.placement is not None
    expected = expected_spans(planner.placement)
    assert {span.row for span in expected} == {span.row for span in measured if span.kind != "wait"}
    for span in (*expected, *measured):
        assert 0 <= span.start_s <= span.end_s
    sent = sum(span.size_bytes for span in measured)
    assert sent == session.timeline.partition.crossing_bytes() > 0
    for name, spans in (("expected", expected), ("measured", measured)):
        write_trace(spans, tmp_path / f"{name}.json", name)
        events = json.loads((tmp_path / f"{name}.json").read_text())["traceEvents"]
        assert sum(event["ph"] == "X" for event in events) == len(spans)
        rows = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
        assert rows == {span.row for span in spans}


@pytest.mark.parametrize(
    ("hints", "parts"),
    [
        ({"left": "cpu:0", "right": "cpu:1", "head": "cpu:1"}, 1),
        ({"left.0": "cpu:1", "left.1": "cpu:0", "left.2": "cpu:1", "right": "cpu:0", "head": "cpu:1"}, 2),
    ],
)
def test_compared_steps_have_the_same_names_too(hints: dict[str, str], parts: int) -> None:
    graph, two = towers(), cluster(2)
    planner = Planner(lambda whole: placed(whole, two, hints))
    workers = ThreadWorkers([device.name for device in two.devices])
    with PlacedSession(graph, planner, workers, microbatches=parts, compile="eager", timeout_s=30.0) as session:
        session.watch_time = True
        session.run(["train", "loss"], (torch.randn(8, 32).double(), torch.zeros(8, dtype=torch.int64)))
        assert session.timeline is not None
    assert planner.placement is not None
    expected, measured = compared(session.timeline, planner.placement)
    for kind in ("task", "transfer"):
        found = [
            sorted((s.row, s.name, s.size_bytes) for s in spans if s.kind == kind) for spans in (expected, measured)
        ]
        assert found[0] == found[1] != []
    calls = sum(span.kind == "task" for span in measured)
    assert calls < len(expected_spans(planner.placement)), "tasks that ran in one call are one span"
    assert {span.kind for span in measured} <= {"task", "transfer", "wait", "copies"}
    alone = follow(planner.placement, session.timeline.graph).expected.step_s
    assert max(span.end_s for span in expected) == pytest.approx(alone)
