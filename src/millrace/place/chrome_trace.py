"""Timelines in the format of Chrome's and Perfetto's trace viewers: who did what, and when.

Open the file at ui.perfetto.dev or chrome://tracing. A simulated step and a measured one look the same: one row of
tasks for each device, and one of transfers for each that sends.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from millrace.files import replace_bytes
from millrace.place.placement import Placement


@dataclass(frozen=True)
class Span:
    """Something that takes time. row: "/host:0/cpu:0", or "/host:0/cpu:0 sends". Times in seconds from the start."""

    row: str
    name: str
    start_s: float
    end_s: float
    kind: str = "task"
    size_bytes: int = 0


def expected_spans(placement: Placement) -> list[Span]:
    """What the simulator expects of a step."""
    problem, found = placement.problem, placement.expected
    names = problem.device_names_D
    spans = [
        Span(names[placement.plan.device_G[group]], name, float(start), float(end))
        for name, group, start, end in zip(
            problem.task_names_T, problem.group_T, found.start_s_T, found.end_s_T, strict=True
        )
        if end > start
    ]
    for transfer in found.transfers:
        task = problem.task_names_T[problem.producer_K[transfer.tensor]]
        row = f"{names[transfer.source]} sends"
        label = f"{task} to {names[transfer.target]}"
        spans.append(Span(row, label, transfer.start_s, transfer.end_s, "transfer", int(transfer.size_bytes)))
    return spans


def write_trace(spans: Iterable[Span], path: Path, title: str) -> None:
    """Write a timeline. Args: title: the name of the process that rows are shown under. Raises: OSError."""
    spans = list(spans)
    rows = {row: number for number, row in enumerate(sorted({span.row for span in spans}))}
    events: list[dict[str, object]] = [
        {"ph": "M", "pid": 0, "name": "process_name", "args": {"name": title}},
        *({"ph": "M", "pid": 0, "tid": n, "name": "thread_name", "args": {"name": row}} for row, n in rows.items()),
    ]
    for span in spans:
        events.append(
            {
                "ph": "X",
                "pid": 0,
                "tid": rows[span.row],
                "name": span.name,
                "cat": span.kind,
                "ts": 1e6 * span.start_s,
                "dur": 1e6 * (span.end_s - span.start_s),
                "args": {"bytes": span.size_bytes} if span.size_bytes else {},
            }
        )
    replace_bytes(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode())
