"""Timelines in the format of Chrome's and Perfetto's trace viewers: who did what, and when.

Open the file at ui.perfetto.dev or chrome://tracing. A simulated step and a measured one look the same: one row of
tasks for each device, and one of transfers for each that sends.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
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
    """What the simulator expects of a step: the graph's tasks, and the transfers."""
    problem, found = placement.problem, placement.expected
    names = problem.device_names_D
    first = problem.tasks - len(placement.grouping.tasks)  # before it: variables being there for others, for no time
    spans = [
        Span(
            names[placement.plan.device_G[problem.group_T[task]]],
            problem.task_names_T[task],
            float(found.start_s_T[task]),
            float(found.end_s_T[task]),
        )
        for task in range(first, problem.tasks)
    ]
    for transfer in found.transfers:
        task = problem.task_names_T[problem.producer_K[transfer.tensor]]
        row = f"{names[transfer.source]} sends"
        label = f"{task} to {names[transfer.target]}"
        spans.append(Span(row, label, transfer.start_s, transfer.end_s, "transfer", int(transfer.size_bytes)))
    return spans


def write_trace(spans: Iterable[Span], path: Path, title: str) -> None:
    """Write a timeline. Args: title: the name of the process that rows are shown under. Raises: OSError."""
    replace_bytes(path, trace_bytes({title: spans}))


def trace_bytes(timelines: Mapping[str, Iterable[Span]]) -> bytes:
    """The content of a trace file. Args: timelines: title -> spans; they are shown one below the other."""
    events = [event for number, title in enumerate(timelines) for event in _events(number, title, timelines[title])]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode()


def _events(process: int, title: str, timeline: Iterable[Span]) -> Iterator[dict[str, object]]:
    spans = list(timeline)
    rows = {row: number for number, row in enumerate(sorted({span.row for span in spans}))}
    yield {"ph": "M", "pid": process, "name": "process_name", "args": {"name": title}}
    yield {"ph": "M", "pid": process, "name": "process_sort_index", "args": {"sort_index": process}}
    for row, number in rows.items():
        yield {"ph": "M", "pid": process, "tid": number, "name": "thread_name", "args": {"name": row}}
    for span in spans:
        yield {
            "ph": "X",
            "pid": process,
            "tid": rows[span.row],
            "name": span.name,
            "cat": span.kind,
            "ts": 1e6 * span.start_s,
            "dur": 1e6 * (span.end_s - span.start_s),
            "args": {"bytes": span.size_bytes} if span.size_bytes else {},
        }
