"""Placements as the pieces that `cut` takes."""

from __future__ import annotations

from collections.abc import Callable

from millrace.graph.graph import Graph
from millrace.partition.pieces import Piece
from millrace.place.placement import Placement, follow


def pieces_of(placement: Placement) -> list[Piece]:
    """The tasks of a placement, in its order."""
    return [
        Piece(task.name, device, tuple(node.name for node in task.nodes)) for task, device in placement.ordered_tasks()
    ]


class Planner:
    """Places the first graph that it is given by a search, and other graphs of the same step like that one.

    search: makes a placement. placement: the first one, once there is one.
    """

    def __init__(self, search: Callable[[Graph], Placement], *, fused: bool = True) -> None:
        self.placement: Placement | None = None
        self._search = search
        self._fused = fused

    def __call__(self, graph: Graph) -> list[Piece]:
        """The pieces of a graph."""
        if self.placement is None:
            self.placement = self._search(graph)
            return pieces_of(self.placement)
        if not graph.nodes:  # what is fetched is a variable, or in the batch
            return []
        return pieces_of(follow(self.placement, graph, fused=self._fused))
