"""The programs of a replica on a GPU, where its variables are in host memory: parameter servers fill them there.

A replica that keeps its variables from step to step has them on the GPU itself, and needs nothing of this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from millrace.compile.tiered import Say
from millrace.graph.graph import Graph
from millrace.graph.passes.to_device import to_device
from millrace.runtime.session import Session


class GpuPrograms:
    """Runs programs on a GPU. Args: device: it."""

    def __init__(self, device: torch.device, *, compile: str, say: Say) -> None:
        self._device, self._compile, self._say = device, compile, say
        self._there: dict[str, Tensor] = {}  # the variables of all programs

    def program(self, graph: Graph, variables: Mapping[str, Tensor], pieces: bytes = b"") -> GpuProgram:
        """A program for the GPU.

        Args: graph: changes no variable. variables: all that the programs read, in host memory, looked up at every run.
            pieces: it has none.
        """
        for variable in graph.variables:
            own = variables[variable.name]
            self._there.setdefault(variable.name, torch.empty_like(own, device=self._device))
        there = {variable.name: self._there[variable.name] for variable in graph.variables}
        session = Session(to_device(graph, self._device), there, compile=self._compile, say=self._say)
        return GpuProgram(graph, session, variables)


class GpuProgram:
    """A program that runs on a GPU, with the face of a `Session` in host memory."""

    def __init__(self, graph: Graph, session: Session, variables: Mapping[str, Tensor]) -> None:
        self.graph, self._session, self._variables = graph, session, variables

    def run(self, fetches: Sequence[str], feed: Mapping[str, Tensor] | None) -> list[Tensor]:
        """Run fetches with the variables as they are now. Returns: results in host memory. Raises: as `Session.run`."""
        for name, there in self._session.variables.items():
            there.copy_(self._variables[name])
        return [value.cpu() for value in self._session.run(list(fetches), feed)]

    @property
    def last_tier(self) -> str:
        """See `Session.last_tier`."""
        return self._session.last_tier

    def close(self) -> None:
        """End what compiles in the background."""
        self._session.close()
