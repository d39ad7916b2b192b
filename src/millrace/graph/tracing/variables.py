"""Finding the variables of a step in what the user hands over, and standing other tensors in for them while tracing.

A user names modules, `torch.optim` optimizers and plain tensors; the variables are the tensors inside: parameters and
buffers under the module's own names, optimizer slots as "optimizer/<parameter>/<slot>".
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from millrace.errors import TraceError, did_you_mean
from millrace.graph.signature import Role, TensorSpec, Variable
from millrace.graph.tracing.modules import module_with, refuse_module
from millrace.graph.tracing.optimizer_state import OptimizerState


@dataclass(frozen=True)
class Value:
    """A plain tensor given as a variable, with more said about it than its name: its role, and whose slot it is."""

    tensor: Tensor
    role: Role = Role.TENSOR
    owner: str | None = None


@dataclass(frozen=True)
class Slot:
    """A variable and the caller's own tensor that holds its value."""

    variable: Variable
    tensor: Tensor


class Holders:
    """The modules, optimizers and tensors that a step was given, and the variables inside them.

    `given` maps a name to an `nn.Module`, a `torch.optim.Optimizer` or a tensor. The name is a prefix for what is
    inside; an empty name gives a module's tensors their own names. Tied parameters are one variable, under the first
    of their names.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.modules = {name: value for name, value in given.items() if isinstance(value, nn.Module)}
        values = {name: Value(value) for name, value in given.items() if isinstance(value, Tensor)}
        values |= {name: value for name, value in given.items() if isinstance(value, Value)}
        self.tensors = {name: value.tensor for name, value in values.items()}
        optimizers = {name: value for name, value in given.items() if isinstance(value, Optimizer)}
        for name, value in given.items():
            if not isinstance(value, nn.Module | Tensor | Value | Optimizer):
                raise TraceError(
                    f"variable {name!r}: expected a tensor, an nn.Module or a torch.optim.Optimizer, "
                    f"got {type(value).__name__}. Wrap numbers as torch.tensor(...)."
                )
        self.slots: dict[str, Slot] = {}
        self._name_of: dict[int, str] = {}
        for prefix, module in self.modules.items():
            refuse_module(prefix, module)
            for name, parameter in module.named_parameters(prefix):
                self._add(name, parameter, Role.PARAMETER)
            for name, buffer in module.named_buffers(prefix):
                self._add(name, buffer, Role.BUFFER)
        for name, value in values.items():
            self._add(name, value.tensor, value.role, value.owner)
        self.optimizers = {
            name: OptimizerState(value, {id(s.tensor): n for n, s in self.slots.items()}, name)
            for name, value in optimizers.items()
        }
        for name, state in self.optimizers.items():
            for slot, tensor in state.tensors.items():
                owner = state.owner[slot]
                self._add(f"{name}/{slot}", tensor, Role.OPTIMIZER, owner or f"{name}/{slot}")

    def _add(self, name: str, tensor: Tensor, role: Role, owner: str | None = None) -> None:
        if id(tensor) in self._name_of:
            return
        if name in self.slots:
            raise TraceError(f"two variables are called {name!r}; give the modules or tensors different names")
        self._name_of[id(tensor)] = name
        self.slots[name] = Slot(Variable(name, TensorSpec.of(tensor), role, owner or name), tensor)

    def scopes(self) -> dict[int, str]:
        """Module path by the module's identity."""
        found: dict[int, str] = {}
        for prefix, module in self.modules.items():
            for path, child in module.named_modules(prefix=prefix):
                found.setdefault(id(child), path)
        return found

    @contextlib.contextmanager
    def standing_in(self, tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Any]]:
        """Put `tensors` (one per variable) in the place of the caller's own.

        Yields what the step sees: a dict in which plain tensors are replaced and modules and optimizers stay themselves
        (their insides are replaced). On leaving, the caller's tensors are back, whatever happened.
        """
        by_id = {id(self.slots[name].tensor): tensor for name, tensor in tensors.items()}
        with contextlib.ExitStack() as stack:
            for prefix, module in self.modules.items():
                stack.enter_context(module_with(prefix, module, by_id))
            view: dict[str, Any] = {**self.modules}
            for name, state in self.optimizers.items():
                own = {slot: tensors[f"{name}/{slot}"] for slot in state.tensors}
                stack.enter_context(state.standing_in(own, by_id))
                view[name] = state.optimizer
            for name, tensor in self.tensors.items():
                view[name] = by_id[id(tensor)]
            yield view

    def current(self, view: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensor that stands for each variable now, inside `standing_in`: a step may have rebound some.

        A module may assign a new tensor to a buffer, and a step may say `v["W"] = v["W"] - g`.

        Raises: TraceError when the step has put something under another name, or removed one.
        """
        self._check_names(view)
        found: dict[str, Tensor] = {}
        for prefix, module in self.modules.items():
            named = [*module.named_parameters(prefix), *module.named_buffers(prefix)]
            found.update({name: tensor for name, tensor in named if name in self.slots})
        found.update({name: view[name] for name in self.tensors if name in self.slots})
        for name, state in self.optimizers.items():
            found.update({f"{name}/{slot}": tensor for slot, tensor in state.current().items()})
        return found

    def _check_names(self, view: Mapping[str, Any]) -> None:
        known = [*self.modules, *self.tensors, *self.optimizers]
        for name in view:
            if name not in known:
                raise TraceError(
                    f"the step assigns to {name!r}, which is not among the variables, so the value would be lost. "
                    f"{did_you_mean(name, known)} Name it as a variable, or return it from the step, to fetch it."
                )
        for name in known:
            if name not in view:
                raise TraceError(f"the step removes the variable {name!r}. Leave it in place: it is there next time.")
        for name, module in self.modules.items():
            if view[name] is not module:
                raise TraceError(
                    f"the step puts another module in the place of {name!r}, which would be lost. "
                    "Change its parameters in place, or use torch.func.functional_call with others."
                )
