"""A program that tells of its first results while it still computes the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from millrace.compile.tiered import Say
from millrace.graph.graph import Graph, feed_key
from millrace.graph.passes.prune import prune
from millrace.partition.in_turn import in_turn
from millrace.replicas.stages import Stages
from millrace.runtime.aliasing import Memory
from millrace.runtime.device import DeviceRunner
from millrace.runtime.feeds import FeedReader
from millrace.runtime.ranges import check_ranges, feed_ranges
from millrace.runtime.watch import explained

_NEVER_S = 0.0  # nothing is received from another device


class StagedProgram:
    """Runs all fetches of a graph, stage after stage.

    Args: graph: updates nothing. stages: fetches that are to come early. variables: all that the graph reads, by name.
    """

    def __init__(
        self, graph: Graph, stages: Stages, variables: Mapping[str, Tensor], *, compile: str, say: Say
    ) -> None:
        self._graph = prune(graph, tuple(graph.fetches), ())
        self._variables = variables
        self._stages = stages
        self._cut = in_turn(self._graph, stages)
        self._runner = DeviceRunner(self._cut.program, [], variables, compile=compile, say=say)
        self._reader = FeedReader(graph, Memory(variables.values()))
        self._ranges = feed_ranges(self._graph)

    def run(self, feeds: Mapping[str, Tensor], early: Callable[[Mapping[str, Tensor]], None]) -> dict[str, Tensor]:
        """All fetches. Args: early: called with the values of each stage as soon as they are there, in order.

        Raises: as `Session.run`.
        """
        batch = self._reader.read(dict(feeds))
        check_ranges(self._ranges, [batch.given])
        given = {feed_key(feed.name): t for feed, t in zip(self._graph.feeds, batch.placed, strict=True)}
        waiting = list(zip(self._cut.ready, self._stages, strict=True))

        def made(segment: int, values: Mapping[str, Tensor]) -> None:
            while waiting and waiting[0][0] == segment:
                _, names = waiting.pop(0)
                early({name: self._value(name, values, given) for name in names})

        try:
            values = self._runner.step(given, _Nobody(), _NEVER_S, made=made)
        except (RuntimeError, IndexError, ValueError) as error:
            variables = [self._variables[variable.name] for variable in self._graph.variables]
            found = explained(error, self._graph, variables, batch.placed)
            if found is None:
                raise
            raise found from error
        return {name: self._value(name, values, given) for name in self._graph.fetches}

    @property
    def last_tier(self) -> str:
        """ "inductor" when all that ran last was compiled."""
        return "inductor" if set(self._runner.tiers) == {"inductor"} else "eager"

    def close(self) -> None:
        """End what compiles in the background."""
        self._runner.close()

    def _value(self, name: str, values: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Tensor:
        value = self._cut.values[name]
        return given[value] if value in given else values[value]


class _Nobody:
    """No other device."""

    def send(self, edge: int, tensor: Tensor) -> None:
        raise AssertionError("a program of one device sends nothing")

    def recv(self, edge: int, timeout_s: float) -> Tensor:
        raise AssertionError("a program of one device receives nothing")
