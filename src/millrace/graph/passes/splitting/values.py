"""What a value of the whole graph is in the split one: whole, or blocks along one dimension."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TypeAlias

from torch.fx import Node


@dataclass(frozen=True)
class Along:
    """A layout: blocks along `dim`; block k holds bounds[k] to bounds[k + 1] (bounds[0] is 0)."""

    dim: int
    bounds: tuple[int, ...]

    def sizes(self) -> list[int]:
        """How long each block is."""
        return [stop - start for start, stop in itertools.pairwise(self.bounds)]

    def moved(self, dim: int) -> Along:
        """The same blocks along another dimension."""
        return Along(dim, self.bounds)


@dataclass(frozen=True, eq=False)
class Split:
    """A value in blocks. `weight`: blocks of a variable, or views of them, which are to stay where they are."""

    along: Along
    blocks: tuple[Node, ...]
    weight: bool = False


@dataclass(frozen=True, eq=False)
class Several:
    """The value of an operator with several results; None for a result that it leaves out."""

    values: tuple[Value, ...]


Layout: TypeAlias = Along | None  # None: whole
Value: TypeAlias = "Node | Split | Several | None"


def even(extent: int, parts: int, dim: int) -> Along:
    """`parts` blocks along `dim`, as equal as can be; the first ones are longer by one where it does not come out."""
    least, more = divmod(extent, parts)
    bounds = [0]
    for block in range(parts):
        bounds.append(bounds[-1] + least + (block < more))
    return Along(dim, tuple(bounds))
