"""One device at work: it runs its program, step after step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from millrace.compile.layout import feed_strides, laid_out
from millrace.compile.tiered import Runner, Say
from millrace.partition.program import DeviceProgram, Edge, Recv, Run, Send


class Exchange(Protocol):
    """How a device's values get to the others; `millrace.runtime.transport` has several."""

    def send(self, edge: int, tensor: Tensor) -> None:
        """Send the value of an edge; when it returns, the tensor may be overwritten."""

    def recv(self, edge: int, timeout_s: float) -> Tensor:
        """The value of an edge, valid until the next step."""


class DeviceRunner:
    """Holds the variables of one device and what it has compiled of one program.

    variables: name -> tensor; they are updated in place, and may serve several programs.
    """

    def __init__(
        self,
        program: DeviceProgram,
        edges: Sequence[Edge],
        variables: Mapping[str, Tensor],
        *,
        compile: str = "eager",
        say: Say = lambda _: None,
    ) -> None:
        self.program = program
        graphs = [segment.graph for segment in program.segments]
        self._values_of = {edge.number: edge.value for edge in edges}
        self._runners = [Runner(graph, compile, say) for graph in graphs]
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
    ) -> dict[str, Tensor]:
        """Run the program once.

        Args: feeds: "feed:NAME" -> tensor, for those that it reads. at: called before every instruction.

        Returns: the values that it hands to the caller, by name.

        Raises: WorkerError when a value did not come in time; whatever an operator raises.
        """
        values: dict[str, Tensor] = {}
        for instruction in self.program.instructions:
            at(instruction)
            if isinstance(instruction, Run):
                self._run(instruction, values, feeds)
            elif isinstance(instruction, Send):
                name = self._values_of[instruction.edge]
                exchange.send(instruction.edge, values[name] if name in values else self._sent_variables[name])
            else:
                values[self._values_of[instruction.edge]] = exchange.recv(instruction.edge, timeout_s)
        return {name: values[name] for name in self.program.fetches}

    def _run(self, instruction: Run, values: dict[str, Tensor], feeds: Mapping[str, Tensor]) -> None:
        index = instruction.segment
        segment = self.program.segments[index]
        given = [feeds[name] if name.startswith("feed:") else values[name] for name in segment.inputs]
        made = self._runners[index](self._variables[index], laid_out(given, self._strides[index]))
        values.update(zip(segment.outputs, made, strict=True))
        for name in instruction.forget:
            values.pop(name, None)
