"""One copy of the variables and the two halves of the step over them: what a worker computes, without whom it tells.

`compute` changes no variable, so that a step can be given up and done again; `commit` changes all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from millrace.compile.tiered import Say
from millrace.errors import WorkerError
from millrace.graph.graph import TRAIN, Graph
from millrace.graph.passes.to_device import to_device
from millrace.graph.random import slice_random
from millrace.graph.signature import Role, TensorSpec
from millrace.replicas.divided import NEW, DividedProgram, program_of
from millrace.replicas.elsewhere import Elsewhere
from millrace.replicas.gpu_programs import GpuProgram
from millrace.replicas.staged_program import StagedProgram
from millrace.replicas.stages import Stages, all_stages
from millrace.runtime.session import Session

Program = Session | StagedProgram | DividedProgram | GpuProgram
Early = Callable[[Mapping[str, Tensor]], None]  # is given values as soon as they are there


@dataclass(frozen=True)
class Slice:
    """A slice of a batch, as a worker gets it.

    number: in the batch. key: of its program. weight: its share of the batch's examples. batches: its feeds, of one
    batch after the other where a step has several; with a weight of 0 it has no examples, or some
    that are not to count.
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
    stages: the names of the means, in the order in which they are added up, which is the same for all workers. begun:
    how many of these stages were handed over early.
    """

    fetches: tuple[Mapping[str, Tensor], ...]
    means: Mapping[str, Tensor]
    others: Mapping[str, Tensor]
    stages: Stages
    begun: int = 0


class Gradients:
    """Variables, and programs that make gradients of slices with them.

    Args:
        exchanged: names of what the update reads.
        variables: all that the programs read, by name.
        stages: of the exchanged values, those that can be given early.
        elsewhere: runs the programs where the variables are not, and gives nothing early; None: they run here.
        gpu: where the variables are, and all that is computed; None: on the CPU.
    """

    def __init__(
        self,
        exchanged: Sequence[str],
        variables: Mapping[str, Tensor],
        *,
        compile: str,
        say: Say,
        stages: Stages = (),
        elsewhere: Elsewhere | None = None,
        gpu: torch.device | None = None,
    ) -> None:
        self.variables = dict(variables)
        self._elsewhere, self._gpu = elsewhere, gpu
        self._compile, self._say, self._stages = compile, say, stages
        self._staged: dict[int, StagedProgram] = {}
        self._random = ""
        self._exchanged = tuple(exchanged)
        self._programs: dict[int, Session | DividedProgram | GpuProgram] = {}

    def load(self, key: int, gradients: Graph, pieces: bytes = b"") -> None:
        """Make the gradients' half of the step, for slices of one shape, ready under the number `key`.

        Args: pieces: of `Placer.pieces`, where it is to run on several devices.
        """
        self._random = next((v.name for v in gradients.variables if v.role is Role.RANDOM), self._random)
        program = program_of(gradients)
        if self._elsewhere is not None:
            self._programs[key] = self._elsewhere.program(program, self.variables, pieces)
        else:
            self._programs[key] = self._session(program)

    def values(
        self, number: int, key: int, feeds: Mapping[str, Tensor], early: Early | None = None
    ) -> dict[str, Tensor]:
        """What slice `number` of a batch gives: fetches, exchanged values and, behind `NEW`, what the forward pass
        makes of variables, none of which is changed.

        Args: early: is given the values of each stage while the others are computed. None: they all come at the end.
        """
        random = self.variables.get(self._random)
        if random is None:
            return self._run(key, feeds, early)
        base = random.clone()
        random.copy_(slice_random(base, number))
        try:
            values = self._run(key, feeds, early)
        finally:
            random.copy_(base)
        drawn = values.get(NEW + self._random)
        if drawn is not None:  # of the slice's own stream: only the count is shared
            values[NEW + self._random] = torch.stack([base[0], drawn[1]])
        return values

    def use(self, variables: Mapping[str, Tensor]) -> None:
        """Let other tensors be some of the variables from here on; for programs without stages."""
        self.variables |= variables
        for session in self._programs.values():
            if isinstance(session, Session):
                session.use({name: tensor for name, tensor in variables.items() if name in session.variables})

    @property
    def tier(self) -> str:
        """ "inductor" when all that ran last was compiled."""
        return "inductor" if {session.last_tier for session in self._sessions()} == {"inductor"} else "eager"

    def close(self) -> None:
        """End what compiles in the background."""
        for session in [*self._sessions(), *self._programs.values()]:
            session.close()

    def _run(self, key: int, feeds: Mapping[str, Tensor], early: Early | None) -> dict[str, Tensor]:
        session = self._program(key)
        if early is None or not self._stages or self._elsewhere:
            names = list(session.graph.fetches)
            return dict(zip(names, session.run(names, dict(feeds) or None), strict=True))
        if key not in self._staged:
            self._staged[key] = StagedProgram(
                session.graph, self._stages, self.variables, compile=self._compile, say=self._say
            )
        return self._staged[key].run(feeds, early)

    def _sessions(self) -> list[Program]:
        return [self._staged.get(key, session) for key, session in self._programs.items()]

    def _session(self, graph: Graph) -> Session:
        graph = graph if self._gpu is None else to_device(graph, self._gpu)
        own = {variable.name: self.variables[variable.name] for variable in graph.variables}
        return Session(graph, own, compile=self._compile, say=self._say)

    def _program(self, key: int) -> Session | DividedProgram | GpuProgram:
        if key not in self._programs:
            raise WorkerError(f"program {key} was not given to this worker before a slice of a batch that needs it.")
        return self._programs[key]


class Replica(Gradients):
    """Variables and programs of one worker, the update among them.

    Args:
        update: the half of the step that applies gradients.
        variables: all of the step's, by name; they are changed in place.
        stages: see `stages.early_stages`.
        elsewhere, gpu: see `Gradients`.
    """

    def __init__(
        self,
        update: Graph,
        variables: Mapping[str, Tensor],
        *,
        compile: str,
        say: Say,
        stages: Stages = (),
        elsewhere: Elsewhere | None = None,
        gpu: torch.device | None = None,
    ) -> None:
        exchanged = [feed.name for feed in update.feeds]
        super().__init__(exchanged, variables, compile=compile, say=say, stages=stages, elsewhere=elsewhere, gpu=gpu)
        self._update = self._session(update)
        self._random = next((v.name for v in update.variables if v.role is Role.RANDOM), "")

    def _sessions(self) -> list[Program]:
        return [self._update, *super()._sessions()]

    def compute(self, slices: Sequence[Slice], begin: Callable[[Sequence[Tensor]], None] | None = None) -> Computed:
        """Forward and backward for some slices of a batch.

        Args: begin: is given the means of each stage but the last as soon as they are there, which are not changed
            afterwards. None: nothing is given early.

        Raises: WorkerError for a program that was not loaded; what the step itself raises.
        """
        fetches: list[Mapping[str, Tensor]] = []
        means: dict[str, Tensor] = {}
        others: dict[str, Tensor] = {}
        begun = 0

        def add(values: Mapping[str, Tensor], weight: float) -> None:
            for name in [n for n in values if n in self._exchanged or n.startswith(NEW)]:
                value = values[name]
                if not value.is_floating_point():
                    others.setdefault(name, value)
                elif name in means:
                    means[name].add_(value, alpha=weight)
                else:
                    means[name] = value.mul(weight).contiguous()  # it may be a view of another one

        for one in slices:
            known: set[str] = set()

            def early(values: Mapping[str, Tensor], weight: float = one.weight, known: set[str] = known) -> None:
                nonlocal begun
                add(values, weight)
                known.update(values)
                assert begin is not None
                begin([means[name] for name in values])
                begun += 1

            is_last = one is slices[-1]  # the others are sums that grow
            if one.weight:
                values = self.values(one.number, one.key, one.batches[0], early if begin and is_last else None)
            else:
                values = self._nothing(one.key)
            add({name: value for name, value in values.items() if name not in known}, one.weight)
            fetches.append({n: v for n, v in values.items() if n not in self._exchanged and not n.startswith(NEW)})
        return Computed(tuple(fetches), means, others, all_stages(self._stages, means), begun)

    def _nothing(self, key: int) -> dict[str, Tensor]:
        """What a slice without examples adds to the means."""
        graph = self._program(key).graph
        specs = {name: TensorSpec.of(graph.node(node).meta["val"]) for name, node in graph.fetches.items()}
        return {
            name: torch.zeros(spec.shape, dtype=spec.dtype, device=self._gpu)
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
