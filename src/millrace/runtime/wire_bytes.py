"""What one step sent between devices, and what it would have sent without narrowing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from millrace.graph.sizes import human_bytes
from millrace.partition.program import Edge, Partition

Reported = Sequence[tuple[int, int]]  # by a device: (edge number, bytes of its code)


@dataclass(frozen=True)
class EdgeBytes:
    """One edge in one step. sent_bytes: what it carried; as many as the tensor has where narrowing did not pay."""

    edge: Edge
    sent_bytes: int

    @property
    def whole_bytes(self) -> int:
        """Bytes of the tensor as it is."""
        return self.edge.spec.size_bytes


@dataclass(frozen=True)
class WireBytes:
    """All edges in one step, in the order of their numbers. Prints as a sentence; `table` has every edge."""

    edges: tuple[EdgeBytes, ...]

    @property
    def sent_bytes(self) -> int:
        """Bytes that went from device to device."""
        return sum(one.sent_bytes for one in self.edges)

    @property
    def whole_bytes(self) -> int:
        """Bytes that would have gone without narrowing."""
        return sum(one.whole_bytes for one in self.edges)

    @property
    def narrowed(self) -> tuple[EdgeBytes, ...]:
        """The edges that have a codec."""
        return tuple(one for one in self.edges if one.edge.codec is not None)

    def of(self, number: int) -> int:
        """Bytes that the edge of that number carried."""
        return self.edges[number].sent_bytes

    def __str__(self) -> str:
        if not self.narrowed:
            return f"{human_bytes(self.sent_bytes)} a step over {len(self.edges)} edges, none of them narrowed"
        return (
            f"{human_bytes(self.sent_bytes)} a step instead of {human_bytes(self.whole_bytes)}, "
            f"{len(self.narrowed)} of {len(self.edges)} edges narrowed"
        )

    def table(self) -> str:
        """A line for each edge, the largest tensors first."""
        lines = [("tensor", "from", "to", "as", "bytes", "instead of")]
        for one in sorted(self.edges, key=lambda one: -one.whole_bytes):
            edge = one.edge
            codec = edge.codec or "it is"
            lines.append((edge.value, edge.source, edge.target, codec, f"{one.sent_bytes:,}", f"{one.whole_bytes:,}"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        left = [[cell.ljust(width) for cell, width in zip(line[:4], widths, strict=False)] for line in lines]
        right = [[cell.rjust(width) for cell, width in zip(line[4:], widths[4:], strict=True)] for line in lines]
        return "\n".join("  ".join([*a, *b]) for a, b in zip(left, right, strict=True))


def sent_in_step(partition: Partition, reported: Iterable[Reported]) -> WireBytes:
    """What a step sent, from what each device has reported of its narrowed edges."""
    codes = dict(pair for pairs in reported for pair in pairs)
    return WireBytes(tuple(EdgeBytes(e, codes.get(e.number, e.spec.size_bytes)) for e in partition.edges))
