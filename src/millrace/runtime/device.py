"""One device at work: it runs its program, step after step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from millrace.compile.layout import feed_strides, laid_out
from millrace.compile.tiered import Runner, Say
from millrace.graph.passes.to_device import to_device
from millrace.partition.program import DeviceProgram, Edge, Recv, Run, Send
from millrace.runtime.staging import Staging

_CPU = torch.device("cpu")


class Exchange(Protocol):
    """How a device's values get to the others; `millrace.runtime.transport` has several."""

    def send(self, edge: int, tensor: Tensor) -> None:
        """Send the value of an edge, from any device; when it returns, the tensor may be overwritten."""

    def recv(self, edge: int, timeout_s: float) -> Tensor:
        """The value of an edge in host memory, valid until the next step."""


class DeviceRunner:
    """Holds the variables of one device and what it has compiled of one program.

    variables: name -> tensor, on `device`; they are updated in place, and may serve several programs.
    device: which PyTorch runs the segments on, wherever they were traced.
    """

    def __init__(
        self,
        program: DeviceProgram,
        edges: Sequence[Edge],
        variables: Mapping[str, Tensor],
        *,
        device: torch.device = _CPU,
        compile: str = "eager",
        say: Say = lambda _: None,
    ) -> None:
        self.program = program
        graphs = [segment.graph for segment in program.segments]
        if device != _CPU:  # the session sees to it that they were traced there
            graphs = [to_device(graph, device) for graph in graphs]
        self._staging = Staging(device, [edge for edge in edges if edge.target == program.device])
        self._values_of = {edge.number: edge.value for edge in edges}
        # What a compiler returns may share memory in ways that the graph does not show.
        writable = [segment.writable if compile == "eager" else () for segment in program.segments]
        self._runners = [Runner(graph, compile, say, names) for graph, names in zip(graphs, writable, strict=True)]
        self._strides = [feed_strides(graph) for graph in graphs]
        self._variables = [[variables[v.name] for v in graph.variables] for graph in graphs]
        self._sent_variables = {value: variables[name] for value, name in program.sent_variables.items()}

    @property
    def tiers(self) -> list[str]:
        """Which tier the last call of every segment ran in."""
        return [runner.tier for runner in self._runners]

    def step(
        self,
        feeds: Mapping[str, Tensor],
        exchange: Exchange,
        timeout_s: float,
        at: Callable[[Send | Recv | Run], None] = lambda _: None,
        made: Callable[[int, Mapping[str, Tensor]], None] = lambda _, __: None,
    ) -> dict[str, Tensor]:
        """Run the program once.

        Args:
            feeds: "feed:NAME" -> tensor in host memory, for those that it reads.
            at: called before every instruction.
            made: called after every segment with its number and the values that are there, on the device.

        Returns: the values that it hands to the caller, by name, in host memory.

        Raises: WorkerError when a value did not come in time; whatever an operator raises.
        """
        values: dict[str, Tensor] = {}
        given = {name: self._staging.to_device(feed) for name, feed in feeds.items()}
        for instruction in self.program.instructions:
            at(instruction)
            if isinstance(instruction, Run):
                self._run(instruction, values, given)
                made(instruction.segment, values)
            elif isinstance(instruction, Send):
                name = self._values_of[instruction.edge]
                exchange.send(instruction.edge, values[name] if name in values else self._sent_variables[name])
            else:
                edge = instruction.edge
                values[self._values_of[edge]] = self._staging.received(edge, exchange.recv(edge, timeout_s))
        fetched = {name: self._staging.to_host(values[name]) for name in self.program.fetches}
        self.wait()
        return fetched

    def close(self) -> None:
        """End what compiles in the background."""
        for runner in self._runners:
            runner.close()

    def wait(self) -> None:
        """Until the device has done all that it was told to; a GPU is told much ahead of time."""
        self._staging.wait()

    def _run(self, instruction: Run, values: dict[str, Tensor], feeds: Mapping[str, Tensor]) -> None:
        index = instruction.segment
        segment = self.program.segments[index]
        given = [feeds[name] if name.startswith("feed:") else values[name] for name in segment.inputs]
        made = self._runners[index](self._variables[index], laid_out(given, self._strides[index]))
        values.update(zip(segment.outputs, made, strict=True))
        for name in instruction.forget:
            values.pop(name, None)
