"""The variables that no parameter server updates: the statistics of BatchNorm, the random stream, what is frozen.

They are the driver's. Those that a forward pass changes travel with every batch, and what it makes of them comes back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from millrace.graph.graph import Graph
from millrace.graph.signature import Role


class Kept:
    """Values by name. Of a batch in slices the mean of new values counts, weighted by examples, as for collective
    replicas. Of batches side by side the newest one's values count; integers (numbers of batches and of random draws)
    are added up, and all batches draw from the stream of the beginning, each from a part of its own (`slice_random`).

    Args:
        gradients: the half of the step with the forward pass.
        held: names of the variables that servers hold.
        sync: whether batches come one after the other.
    """

    def __init__(self, gradients: Graph, held: Collection[str], values: Mapping[str, Tensor], *, sync: bool) -> None:
        self.names = tuple(v.name for v in gradients.variables if v.name not in held)
        self.changing = tuple(name for name in self.names if name in gradients.updates)
        self._sync = sync
        random = [v.name for v in gradients.variables if v.role is Role.RANDOM and v.name in self.changing]
        self._random = random[0] if random else ""
        self.values: dict[str, Tensor] = {}
        self.set(values)

    def set(self, values: Mapping[str, Tensor]) -> None:
        """Give all of them new values, which are copied."""
        self.values = {name: values[name].clone() for name in self.names}
        self._first = self.values.get(self._random)

    def given(self) -> dict[str, Tensor]:
        """What goes with a batch that is handed out now."""
        found = {name: self.values[name] for name in self.changing}
        if self._first is not None and not self._sync:
            found[self._random] = self._first
        return found

    def take(self, given: Mapping[str, Tensor], news: Sequence[Mapping[str, Tensor]], sizes: Sequence[int]) -> None:
        """Take in what a step has made.

        Args: given: what went with it. news: of every slice. sizes: its number of examples.
        """
        for name in self.changing:
            values = [new[name] for new in news]
            if not values[0].is_floating_point():
                added = values[0] - given[name]
                self.values[name] = self.values[name] + added
            else:
                weights = [size / sum(sizes) for size in sizes]
                total = values[0] * weights[0]
                for value, weight in zip(values[1:], weights[1:], strict=True):
                    total = total + value * weight
                self.values[name] = total
