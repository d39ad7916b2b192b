"""A step that was run, as spans of time."""

from __future__ import annotations

from millrace.partition.program import Recv, Run
from millrace.place.chrome_trace import Span
from millrace.runtime.placed_session import Timeline


def measured_spans(timeline: Timeline) -> list[Span]:
    """What every device did, from the first instruction of any: its segments, what it sent, and what it waited for.

    The rows are those of the simulator's spans, with one more for waiting.
    """
    start_s = min(times[0] for times in timeline.times.values() if times)
    edges = timeline.partition.edges
    spans = []
    for device, times in timeline.times.items():
        program = timeline.partition.programs[device]
        for instruction, begun_s, ended_s in zip(program.instructions, times, times[1:], strict=False):
            begin, end = begun_s - start_s, ended_s - start_s
            if isinstance(instruction, Run):
                tasks = program.segments[instruction.segment].tasks
                more = f" … {tasks[-1]}" if len(tasks) > 1 else ""
                spans.append(Span(device, f"{tasks[0]}{more}", begin, end))
                continue
            edge = edges[instruction.edge]
            if isinstance(instruction, Recv):
                spans.append(Span(f"{device} waits", f"{edge.value} from {edge.source}", begin, end, "wait"))
            else:
                name = f"{edge.value} to {edge.target}" + (f" as {edge.codec}" if edge.codec else "")
                size_bytes = timeline.wire.of(edge.number)
                spans.append(Span(f"{device} sends", name, begin, end, "transfer", size_bytes))
    return spans
