"""One copy of the variables and the two halves of the step over them: what a worker computes, without whom it tells.

`compute` changes no variable, so that a step can be given up and done again; `commit` changes all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from millrace.compile.tiered import Say
from millrace.errors import WorkerError
from millrace.graph.graph import TRAIN, Graph
from millrace.graph.random import slice_random
from millrace.graph.signature import Role, TensorSpec
from millrace.runtime.session import Session

NEW = "new/"  # begins the fetch of a variable's value after the forward pass


@dataclass(frozen=True)
class Slice:
    """A slice of a batch, as a worker gets it.

    number: in the batch. key: of its program. weight: its share of the batch's examples. batches: its feeds, of one
    batch after the other where a step has several; with a weight of 0 it has no examples.
    """

    number: int
    key: int
    weight: float
    batches: tuple[Mapping[str, Tensor], ...]


@dataclass(frozen=True)
class Computed:
    """What some slices of a batch gave.

    fetches: of every slice, the user's. means: what is to be added over the workers: gradients and floating buffers,
    each the sum over the slices times their weights. others: new values of variables that need no mean.
    """

    fetches: tuple[Mapping[str, Tensor], ...]
    means: Mapping[str, Tensor]
    others: Mapping[str, Tensor]


class Gradients:
    """Variables, and programs that make gradients of slices with them.

    Args:
        exchanged: names of what the update reads.
        variables: all that the programs read, by name.
    """

    def __init__(self, exchanged: Sequence[str], variables: Mapping[str, Tensor], *, compile: str, say: Say) -> None:
        self.variables = dict(variables)
        self._compile, self._say = compile, say
        self._random = ""
        self._exchanged = tuple(exchanged)
        self._programs: dict[int, Session] = {}

    def load(self, key: int, gradients: Graph) -> None:
        """Make the gradients' half of the step, for slices of one shape, ready under the number `key`."""
        news = {NEW + variable: node for variable, node in gradients.updates.items()}
        self._random = next((v.name for v in gradients.variables if v.role is Role.RANDOM), self._random)
        self._programs[key] = self._session(gradients.with_(fetches={**gradients.fetches, **news}, updates={}))

    def values(self, number: int, key: int, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What slice `number` of a batch gives: fetches, exchanged values and, behind `NEW`, what the forward pass
        makes of variables, none of which is changed."""
        session = self._program(key)
        names = list(session.graph.fetches)
        random = self.variables.get(self._random)
        if random is None:
            return dict(zip(names, session.run(names, dict(feeds) or None), strict=True))
        base = random.clone()
        random.copy_(slice_random(base, number))
        try:
            values = dict(zip(names, session.run(names, dict(feeds) or None), strict=True))
        finally:
            random.copy_(base)
        drawn = values.get(NEW + self._random)
        if drawn is not None:  # of the slice's own stream: only the count is shared
            values[NEW + self._random] = torch.stack([base[0], drawn[1]])
        return values

    @property
    def tier(self) -> str:
        """ "inductor" when all that ran last was compiled."""
        return "inductor" if {session.last_tier for session in self._sessions()} == {"inductor"} else "eager"

    def close(self) -> None:
        """End what compiles in the background."""
        for session in self._sessions():
            session.close()

    def _sessions(self) -> list[Session]:
        return list(self._programs.values())

    def _session(self, graph: Graph) -> Session:
        own = {variable.name: self.variables[variable.name] for variable in graph.variables}
        return Session(graph, own, compile=self._compile, say=self._say)

    def _program(self, key: int) -> Session:
        if key not in self._programs:
            raise WorkerError(f"program {key} was not given to this worker before a slice of a batch that needs it.")
        return self._programs[key]


class Replica(Gradients):
    """Variables and programs of one worker, the update among them.

    Args:
        update: the half of the step that applies gradients.
        variables: all of the step's, by name; they are changed in place.
    """

    def __init__(self, update: Graph, variables: Mapping[str, Tensor], *, compile: str, say: Say) -> None:
        super().__init__([feed.name for feed in update.feeds], variables, compile=compile, say=say)
        self._update = self._session(update)
        self._random = next((v.name for v in update.variables if v.role is Role.RANDOM), "")

    def _sessions(self) -> list[Session]:
        return [self._update, *self._programs.values()]

    def compute(self, slices: Sequence[Slice]) -> Computed:
        """Forward and backward for some slices of a batch.

        Raises: WorkerError for a program that was not loaded; what the step itself raises.
        """
        fetches: list[Mapping[str, Tensor]] = []
        means: dict[str, Tensor] = {}
        others: dict[str, Tensor] = {}
        for one in slices:
            values = self.values(one.number, one.key, one.batches[0]) if one.weight else self._nothing(one.key)
            for name in [n for n in values if n in self._exchanged or n.startswith(NEW)]:
                value = values[name]
                if not value.is_floating_point():
                    others.setdefault(name, value)
                elif name in means:
                    means[name].add_(value, alpha=one.weight)
                else:
                    means[name] = value.mul(one.weight).contiguous()  # it may be a view of another one
            fetches.append({n: v for n, v in values.items() if n not in self._exchanged and not n.startswith(NEW)})
        return Computed(tuple(fetches), means, others)

    def _nothing(self, key: int) -> dict[str, Tensor]:
        """What a slice without examples adds to the means."""
        graph = self._program(key).graph
        specs = {name: TensorSpec.of(graph.node(node).meta["val"]) for name, node in graph.fetches.items()}
        return {
            name: torch.zeros(spec.shape, dtype=spec.dtype)
            for name, spec in specs.items()
            if (name in self._exchanged or name.startswith(NEW)) and spec.dtype.is_floating_point
        }

    def commit(self, means: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Apply the step. Args: means: of the whole batch, by the names in `Computed.means`; others: as computed.

        Returns: the fetches that the update makes.
        """
        values = {**means, **others}
        names = [TRAIN, *self._update.graph.fetches]
        made = self._update.run(names, {name: values[name] for name in self._exchanged} or None)
        for name, value in values.items():
            if name.startswith(NEW):
                self.variables[name.removeprefix(NEW)].copy_(value)
        return dict(zip(names[1:], made[1:], strict=True))
