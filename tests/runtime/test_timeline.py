"""A measured step becomes the same kind of picture as an expected one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tests.place.test_placement import cluster, placed, towers

from millrace.partition.placed import Planner
from millrace.place.chrome_trace import expected_spans, write_trace
from millrace.runtime.placed_session import PlacedSession
from millrace.runtime.thread_workers import ThreadWorkers
from millrace.runtime.timeline import measured_spans


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
