"""A step over parameter servers that was handed out, and is not known to be done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class OpenStep:
    """batch: as the user gave it. parts: of each slice the program, the feeds and the number of examples. given: what
    of the driver's variables went with it. results: of each slice, what its worker told. tau: of the push that it was
    part of. generation: of the group that works at it, if groups do."""

    batch: Any
    parts: list[tuple[int, dict[str, Tensor], int]]
    given: Mapping[str, Tensor] = field(default_factory=dict)
    results: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)
    tau: int = 0
    generation: int = -1

    @property
    def sizes(self) -> list[int]:
        """How many examples each slice has whose results have come."""
        return [self.parts[number][2] for number in self.results]

    def beside(self, prefix: str) -> list[dict[str, Tensor]]:
        """Of every such slice, what begins so, by the name behind it."""
        return [
            {name.removeprefix(prefix): value for name, value in result.items() if name.startswith(prefix)}
            for result in self.results.values()
        ]
