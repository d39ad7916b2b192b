"""What a placed graph becomes: for every device a list of instructions, the same in every step.

A device runs its own list from the first to the last, waiting only where a tensor that it receives has not come yet. No
list depends on the time at which something arrives, so a step gives the same bits however the devices race.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from millrace.graph.graph import Graph
from millrace.graph.signature import TensorSpec, Variable
from millrace.place.wire import expected_bytes

# What a segment is called that holds no part of the graph: it hands over variables as they were before the step, or
# assigns new values at its end.
KEPT, ASSIGNED = "values before the step", "assignments"


@dataclass(frozen=True)
class Edge:
    """A tensor that goes from one device to another, once a step.

    value: the name of the node that makes it, or of the variable that it is (its value before the step).
    codec: how it is narrowed on the way, one of `place.wire.CODECS`; None: not at all.
    """

    number: int
    source: str
    target: str
    value: str
    spec: TensorSpec
    codec: str | None = None

    @property
    def carried(self) -> TensorSpec:
        """What it carries: the tensor, or as many bytes of its code as the tensor itself would take at most."""
        return self.spec if self.codec is None else TensorSpec((self.spec.size_bytes,), torch.uint8)


@dataclass(frozen=True)
class Send:
    """Put a value on an edge."""

    edge: int


@dataclass(frozen=True)
class Recv:
    """Wait for the value of an edge."""

    edge: int


@dataclass(frozen=True)
class Run:
    """Run a segment, and forget the values that nothing after it needs."""

    segment: int
    forget: tuple[str, ...] = ()


Instruction = Send | Recv | Run


@dataclass(frozen=True)
class Segment:
    """Nodes that run in one call: a graph whose feeds are values and feeds of the step, and whose fetches are values.

    inputs: what its feeds are, in order: "feed:NAME" for a feed of the step, otherwise the name of a value that this
        device has made or received. tasks: the names of the parts of the graph in it.
    writable: inputs that were made on this device and are read here only: the segment may write over them.
    """

    graph: Graph
    inputs: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()

    @property
    def outputs(self) -> tuple[str, ...]:
        """The values that it makes for others, in the order in which its graph returns them."""
        return tuple(self.graph.fetches)


@dataclass(frozen=True)
class DeviceProgram:
    """All that one device does in a step.

    variables: those that live on it. sent_variables: value -> variable, for those that go to other devices. feeds: the
    step's feeds that it reads, as "feed:NAME". fetches: the values that it hands to the caller when the step is over.
    """

    device: str
    variables: tuple[Variable, ...]
    feeds: tuple[str, ...]
    segments: tuple[Segment, ...]
    instructions: tuple[Instruction, ...]
    fetches: tuple[str, ...]
    sent_variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Partition:
    """A graph cut for several devices.

    fetches: fetch name -> (device, value) where it is found: a node's name, or "feed:NAME" for a feed.
    homes: variable name -> the device that it lives on.
    """

    programs: Mapping[str, DeviceProgram]
    edges: tuple[Edge, ...]
    fetches: Mapping[str, tuple[str, str]]
    homes: Mapping[str, str] = field(default_factory=dict)

    def crossing_bytes(self) -> int:
        """Bytes that go over links in a step; where that depends on the values, the most that it can be."""
        return sum(expected_bytes(edge.codec, edge.spec) for edge in self.edges)
