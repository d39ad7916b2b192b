"""Rewrite the edges of a partition so that their tensors travel narrowed."""

from __future__ import annotations

from dataclasses import replace

from millrace.graph.graph import Graph
from millrace.partition.program import Partition
from millrace.place.wire import Wire


def narrow(partition: Partition, graph: Graph, wire: Wire) -> Partition:
    """The partition with the codecs that `wire` wants on its edges.

    Programs, segments and what is fetched stay as they are: a device hands over a value and gets one of its own shape
    and dtype, which the transports encode and decode between.

    Args: graph: the one that was cut.
    """
    codecs = wire.codecs(graph)
    return replace(partition, edges=tuple(replace(edge, codec=codecs.get(edge.value)) for edge in partition.edges))
