"""A copy of the variables that trains alone for some steps; the mean of what all changed is a step of an outer rule.

Source: Douillard et al., 2023, "DiLoCo: distributed low-communication training of language models", algorithm 1. The
outer rule is Nesterov's momentum on the mean of (variables before - variables after).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from millrace.compile.tiered import Say
from millrace.errors import WorkerError
from millrace.graph.graph import TRAIN, Graph
from millrace.graph.passes.to_device import to_device
from millrace.graph.random import slice_random
from millrace.graph.signature import BESIDE, Role
from millrace.replicas.replica import Computed, Slice
from millrace.replicas.settings import LocalSteps
from millrace.replicas.stages import all_stages
from millrace.runtime.session import Session


class LocalReplica:
    """Has the methods of `Replica`, for steps of several batches.

    A worker keeps its own optimizer slots from step to step; parameters and buffers are the same for all.

    Args: step: the whole of it. variables: all of them, by name, and the outer momentum of parameters, behind `BESIDE`;
        where that is missing it is zero. rule: the outer one. gpu: where the variables are; None: on the CPU.
    """

    def __init__(
        self,
        step: Graph,
        variables: Mapping[str, Tensor],
        rule: LocalSteps,
        *,
        compile: str,
        say: Say,
        gpu: torch.device | None = None,
    ) -> None:
        self._compile, self._say, self._rule, self._gpu = compile, say, rule, gpu
        self._roles = {variable.name: variable.role for variable in step.variables}
        self._trained = [name for name, role in self._roles.items() if role is Role.PARAMETER]
        moments = {BESIDE + name: torch.zeros_like(variables[name]) for name in self._trained}
        self.variables = {**moments, **variables}
        self._local = {name: variables[name].clone() for name in self._roles}  # what the steps are taken on
        self._programs: dict[int, Session] = {}

    def load(self, key: int, step: Graph, pieces: bytes = b"") -> None:
        """Make the whole step, for slices of one shape, ready under the number `key`. pieces: it has none."""
        step = step if self._gpu is None else to_device(step, self._gpu)
        self._programs[key] = Session(step, self._local, compile=self._compile, say=self._say)

    @property
    def tier(self) -> str:
        """ "inductor" when all that ran last was compiled."""
        tiers = {session.last_tier for session in self._programs.values()}
        return "inductor" if tiers == {"inductor"} else "eager"

    def close(self) -> None:
        """End what compiles in the background."""
        for session in self._programs.values():
            session.close()

    def compute(self, slices: Sequence[Slice], begin: Callable[[Sequence[Tensor]], None] | None = None) -> Computed:
        """Train on the batches of each slice, from the same variables. Fetches are stacked along a new first axis.

        What a slice of weight 0 trains on changes only what is the worker's own: its optimizer's slots.

        Args: begin: nothing is given early, as all is changed until the last step.
        Raises: WorkerError for a program that was not loaded; what the step itself raises.
        """
        fetches: list[Mapping[str, Tensor]] = []
        means: dict[str, Tensor] = {}
        others: dict[str, Tensor] = {}
        for one in slices:
            for name, value in self._local.items():
                value.copy_(self.variables[name])
            fetches.append(self._train(one))
            for name, value in self._local.items():
                if not self._is_shared(name) or not value.is_floating_point():
                    others[name] = value.clone()
                    continue
                change = (self.variables[name] - value).mul_(one.weight)
                means[name] = means[name].add_(change) if name in means else change
        return Computed(tuple(fetches), means, others, all_stages((), means))

    def _is_shared(self, name: str) -> bool:
        return self._roles[name] in (Role.PARAMETER, Role.BUFFER)

    def _train(self, one: Slice) -> dict[str, Tensor]:
        if one.key not in self._programs:
            raise WorkerError(f"program {one.key} was not given to this worker before a slice that needs it.")
        session = self._programs[one.key]
        random = next((name for name, role in self._roles.items() if role is Role.RANDOM), None)
        if random is not None:
            self._local[random].copy_(slice_random(self.variables[random], one.number))
        names = [name for name in session.graph.fetches if not name.startswith("gradient/")]
        found = [session.run([TRAIN, *names], dict(batch))[1:] for batch in one.batches]
        if random is not None:  # the slice has a stream of its own; how often it drew is the same for all
            self._local[random][0] = self.variables[random][0]
        return {name: torch.stack([values[i] for values in found]) for i, name in enumerate(names)}

    def commit(self, means: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take the outer step. Args: means: of what all workers changed; others: as computed. Returns: no fetches."""
        rate, momentum = self._rule.learning_rate, self._rule.momentum
        for name, change in means.items():
            if name in self._trained:
                moment = self.variables[BESIDE + name]
                moment.mul_(momentum).add_(change)
                self.variables[name].sub_(change.add(moment, alpha=momentum), alpha=rate)
            else:
                self.variables[name].sub_(change)
        for name, value in others.items():
            self.variables[name].copy_(value)
        return {}
