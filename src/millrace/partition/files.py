"""The program of a device in a directory, for the process that is that device."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from millrace.files import replace_bytes
from millrace.graph.save import load_graph, save_graph
from millrace.graph.signature import TensorSpec
from millrace.partition.program import DeviceProgram, Edge, Instruction, Recv, Run, Segment, Send

_PROGRAM = "program.json"


def save_program(program: DeviceProgram, edges: Sequence[Edge], directory: Path) -> None:
    """Write a program and all edges of its partition. Raises: OSError; GraphError as `save_graph` does."""
    directory.mkdir(parents=True, exist_ok=True)
    for index, segment in enumerate(program.segments):
        save_graph(segment.graph, directory / f"segment-{index}.graph")
    document = {
        "device": program.device,
        "feeds": program.feeds,
        "fetches": program.fetches,
        "sent_variables": dict(program.sent_variables),
        "segments": [{"inputs": s.inputs, "tasks": s.tasks, "writable": s.writable} for s in program.segments],
        "instructions": [_encode(instruction) for instruction in program.instructions],
        "edges": [
            [e.number, e.source, e.target, e.value, list(e.spec.shape), str(e.spec.dtype)[len("torch.") :], e.codec]
            for e in edges
        ],
    }
    replace_bytes(directory / _PROGRAM, json.dumps(document).encode())


def load_program(directory: Path) -> tuple[DeviceProgram, tuple[Edge, ...]]:
    """What `save_program` wrote; `variables` are those that the segments name. Raises: OSError, GraphError."""
    document = json.loads((directory / _PROGRAM).read_bytes())
    segments = tuple(
        Segment(
            load_graph(directory / f"segment-{index}.graph"),
            tuple(s["inputs"]),
            tuple(s["tasks"]),
            tuple(s["writable"]),
        )
        for index, s in enumerate(document["segments"])
    )
    variables = {v.name: v for segment in segments for v in segment.graph.variables}
    program = DeviceProgram(
        device=document["device"],
        variables=tuple(variables.values()),
        feeds=tuple(document["feeds"]),
        segments=segments,
        instructions=tuple(_decode(entry) for entry in document["instructions"]),
        fetches=tuple(document["fetches"]),
        sent_variables=document["sent_variables"],
    )
    edges = tuple(
        Edge(number, source, target, value, TensorSpec(tuple(shape), getattr(torch, dtype)), codec)
        for number, source, target, value, shape, dtype, codec in document["edges"]
    )
    return program, edges


def _encode(instruction: Instruction) -> list[object]:
    if isinstance(instruction, Run):
        return ["run", instruction.segment, list(instruction.forget)]
    return ["send" if isinstance(instruction, Send) else "recv", instruction.edge]


def _decode(entry: list[object]) -> Instruction:
    kind, number, *rest = entry
    assert isinstance(number, int)
    if kind == "run":
        return Run(number, tuple(rest[0]))  # type: ignore[arg-type]
    return Send(number) if kind == "send" else Recv(number)
