"""A step that was run, as spans of time, and the same step as it was expected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from millrace.partition.program import ASSIGNED, KEPT, Partition, Recv, Run
from millrace.place.chrome_trace import Span, expected_spans
from millrace.place.placement import Placement, follow
from millrace.runtime.placed_session import Timeline


def measured_spans(timeline: Timeline, made_by: Mapping[str, str] | None = None) -> list[Span]:
    """What every device did, from the first instruction of any: its segments, what it sent, and what it waited for.

    The rows are those of the simulator's spans, with one more for waiting.

    Args: made_by: value -> the task that makes it, to call transfers by, as the simulator does.
    """
    start_s = min(times[0] for times in timeline.times.values() if times)
    edges = timeline.partition.edges
    spans = []
    for device, times in timeline.times.items():
        program = timeline.partition.programs[device]
        for instruction, begun_s, ended_s in zip(program.instructions, times, times[1:], strict=False):
            begin, end = begun_s - start_s, ended_s - start_s
            if isinstance(instruction, Run):
                segment = program.segments[instruction.segment]
                kind = "copies" if segment.tasks[0] in (KEPT, ASSIGNED) else "task"
                spans.append(Span(device, _label(segment.tasks), begin, end, kind))
                continue
            edge = edges[instruction.edge]
            if isinstance(instruction, Recv):
                spans.append(Span(f"{device} waits", f"{edge.value} from {edge.source}", begin, end, "wait"))
            else:
                codec = f" as {edge.codec}" if edge.codec and made_by is None else ""
                name = f"{(made_by or {}).get(edge.value, edge.value)} to {edge.target}{codec}"
                size_bytes = timeline.wire.of(edge.number)
                spans.append(Span(f"{device} sends", name, begin, end, "transfer", size_bytes))
    return spans


def compared(timeline: Timeline, placement: Placement, *, fused: bool = True) -> tuple[list[Span], list[Span]]:
    """The same step as expected and as measured, with the same rows and the same names of tasks and transfers.

    Tasks that ran in one call are one span in both. What has no counterpart in the simulator is of the kind "wait" or
    "copies": waiting, and variables that are kept or assigned aside from any task.

    Args: placement: of the step, or of another graph of it. fused: whether compiled code is expected.
    """
    found = follow(placement, timeline.graph, fused=fused)
    inputs = timeline.graph.placeholders()
    groups = found.grouping.groups
    made_by = {node.name: task.name for task in found.grouping.tasks for node in task.nodes}
    made_by |= {inputs[v].name: f"{groups[g]} variables" for v, g in found.grouping.variables.items() if v in inputs}
    return _in_calls(expected_spans(found), timeline.partition), measured_spans(timeline, made_by)


def _in_calls(spans: list[Span], partition: Partition) -> list[Span]:
    """Spans of tasks joined to spans of the calls that they ran in."""
    call_of = {
        (device, task): _label(segment.tasks)
        for device, program in partition.programs.items()
        for segment in program.segments
        for task in segment.tasks
    }
    joined: dict[tuple[str, str], Span] = {}
    rest = []
    for span in spans:
        key = (span.row, call_of.get((span.row, span.name), ""))
        if span.kind != "task" or not key[1]:
            rest.append(span)
        elif (before := joined.get(key)) is None:
            joined[key] = replace(span, name=key[1])
        else:
            start_s, end_s = min(before.start_s, span.start_s), max(before.end_s, span.end_s)
            joined[key] = replace(before, start_s=start_s, end_s=end_s)
    return [*joined.values(), *rest]


def _label(tasks: tuple[str, ...]) -> str:
    return f"{tasks[0]} … {tasks[-1]}" if len(tasks) > 1 else tasks[0]
