"""A `torch.optim` optimizer's state as named variables.

PyTorch makes the state lazily, inside the first `step()`. Here it is made before tracing, so that it can be an input of
the graph: the learning rates and every slot become tensors of their own.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Adafactor, Optimizer, SparseAdam

from millrace.errors import TraceError

# Switches of torch.optim that choose a kernel, not the arithmetic. These values keep a step free of hidden reads
# (`capturable`) and one node per parameter and operation, so that every node has an owner (`foreach`, `fused`).
_TRACEABLE = {"foreach": False, "fused": False, "capturable": True, "differentiable": False}


class OptimizerState:
    """The state of `optimizer`, by slot name.

    `tensors`: "lr" (or "group1/lr", …) and "<parameter>/<slot>". `owner`: the parameter a slot belongs to, "" for
    learning rates. `names`: variable names by the identity of the parameters.
    """

    def __init__(self, optimizer: Optimizer, names: Mapping[int, str], name: str) -> None:
        _refuse(optimizer, name)
        self.optimizer = optimizer
        self._name = name
        self.tensors: dict[str, Tensor] = {}
        self.owner: dict[str, str] = {}
        self._where: dict[str, tuple[int, Tensor | None, str]] = {}  # slot -> (group, parameter, key)
        device = next(p.device for g in optimizer.param_groups for p in g["params"])
        initial = initial_state(optimizer, name)
        many = len(optimizer.param_groups) > 1
        for index, group in enumerate(optimizer.param_groups):
            rate = group["lr"]
            prefix = f"group{index}/" if many else ""
            value = rate.detach() if isinstance(rate, Tensor) else torch.tensor(float(rate), dtype=torch.float64)
            self._add(f"{prefix}lr", value.to(device), "", (index, None, "lr"))
            for position, parameter in enumerate(group["params"]):
                if not parameter.requires_grad:
                    continue
                owner = names.get(id(parameter))
                if owner is None:
                    raise TraceError(
                        f"optimizer {name!r} updates a parameter of shape {list(parameter.shape)} (group {index}, "
                        f"number {position}) that belongs to none of the named variables. "
                        "Name its module or tensor as a variable, too."
                    )
                for key, tensor in initial[index][position].items():
                    self._add(f"{owner}/{key}", tensor, owner, (index, parameter, key))

    def _add(self, slot: str, tensor: Tensor, owner: str, where: tuple[int, Tensor | None, str]) -> None:
        self.tensors[slot] = tensor
        self.owner[slot] = owner
        self._where[slot] = where

    @contextlib.contextmanager
    def standing_in(self, slots: Mapping[str, Tensor], by_id: Mapping[int, Tensor]) -> Iterator[None]:
        """Give the optimizer other tensors for its parameters (`by_id`) and its state (`slots`), and the traceable
        switches, until left."""
        groups, state = self.optimizer.param_groups, self.optimizer.state
        saved = [dict(g) for g in groups]
        live: dict[Any, dict[str, Any]] = defaultdict(dict)
        try:
            for group in groups:
                # Without a gradient there is nothing to do; a frozen parameter has no state to stand in for.
                group["params"] = [by_id[id(p)] for p in group["params"] if p.requires_grad]
                group.update({k: v for k, v in _TRACEABLE.items() if k in group})
            for slot, (index, parameter, key) in self._where.items():
                if parameter is None:
                    groups[index][key] = slots[slot]
                else:
                    live[by_id[id(parameter)]][key] = slots[slot]
            self._live_groups, self._live_state, self._by_id = groups, live, by_id
            self._settings = [_numbers(group) for group in groups]
            self.optimizer.state = live  # type: ignore[assignment]
            yield
        finally:
            for group, content in zip(groups, saved, strict=True):
                group.clear()
                group.update(content)
            self.optimizer.state = state

    def current(self) -> dict[str, Tensor]:
        """The tensors in the state now (inside `standing_in`); some optimizers rebind them.

        Raises: TraceError when the step has changed a number in Python, which the next step would not see.
        """
        for group, before in zip(self._live_groups, self._settings, strict=True):
            changed = [key for key, value in _numbers(group).items() if before.get(key) != value]
            if changed:
                raise _python_state(self.optimizer, self._name, changed[0])
        found: dict[str, Tensor] = {}
        for slot, (index, parameter, key) in self._where.items():
            table = self._live_groups[index] if parameter is None else self._live_state[self._by_id[id(parameter)]]
            found[slot] = table[key]
        return found


def _numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if isinstance(value, int | float | str)}


def _python_state(optimizer: Optimizer, name: str, key: str) -> TraceError:
    return TraceError(
        f"optimizer {name!r}: {type(optimizer).__name__} keeps {key!r} as a Python number and changes it from step to "
        "step, which a graph cannot do. Keep it as a tensor in the state of the parameters, or use an optimizer of "
        "torch.optim or millrace.optim."
    )


def _refuse(optimizer: Optimizer, name: str) -> None:
    kind = type(optimizer).__name__
    if isinstance(optimizer, LBFGS):
        raise TraceError(
            f"optimizer {name!r}: {kind} evaluates the loss several times per step, which one step's "
            "graph cannot say. Use a first-order optimizer such as torch.optim.AdamW."
        )
    if isinstance(optimizer, Adafactor):
        raise TraceError(
            f"optimizer {name!r}: {kind} reads its step counter in Python, to set its learning rate. "
            "Use torch.optim.AdamW, or Adagrad or SGD with momentum where memory is short."
        )
    if isinstance(optimizer, SparseAdam):
        raise TraceError(
            f"optimizer {name!r}: {kind} needs sparse gradients; here an embedding's gradient is dense in "
            "the graph and becomes a row update by itself. Use torch.optim.SGD, Adagrad or Adam."
        )
    if isinstance(optimizer, SGD) and any(g["momentum"] and g["dampening"] for g in optimizer.param_groups):
        raise TraceError(
            f"optimizer {name!r}: SGD with dampening treats its first step apart, in Python. "
            "Use dampening=0, or millrace.optim.momentum."
        )
    if not any(p.requires_grad for g in optimizer.param_groups for p in g["params"]):
        raise TraceError(f"optimizer {name!r} has no parameter that requires a gradient.")


def initial_state(optimizer: Optimizer, name: str) -> list[list[dict[str, Tensor]]]:
    """The state of every parameter, by group and position: the optimizer's own where it has stepped already, otherwise
    what its first step would start from.

    The optimizers of torch make it in `_init_group`; for others a copy of the optimizer takes one step of zero
    gradients at learning rate zero, after which moments are still zero and counters are set back.
    """
    shadow = _shadow(optimizer)
    init_group = getattr(shadow, "_init_group", None)
    if init_group is not None:
        count = len([p for p in inspect.signature(init_group).parameters.values() if p.default is p.empty]) - 1
        for group in shadow.param_groups:
            init_group(group, *([] for _ in range(count)))
    elif all(not state for state in optimizer.state.values()):
        shadow.step()
    found: list[list[dict[str, Tensor]]] = []
    for group, own in zip(shadow.param_groups, optimizer.param_groups, strict=True):
        found.append([])
        for parameter, original in zip(group["params"], own["params"], strict=True):
            state = optimizer.state.get(original) or _fresh(shadow.state.get(parameter, {}), init_group is None)
            if isinstance(optimizer, SGD) and group["momentum"] and state.get("momentum_buffer") is None:
                state = {"momentum_buffer": torch.zeros_like(original)}  # a zero buffer gives the same first step
            numbers = list(_numbers(state))
            if numbers:
                raise _python_state(optimizer, name, numbers[0])
            tensors = {k: v.detach() for k, v in state.items() if isinstance(v, Tensor)}
            found[-1].append({k: v.to(_exact(k, v, original), copy=True) for k, v in tensors.items()})
    return found


def _exact(key: str, tensor: Tensor, parameter: Tensor) -> torch.dtype:
    """Counters become float64: eager optimizers compute with Python's floats where a graph needs tensors."""
    counts = tensor.ndim == 0 and tensor.is_floating_point() and (parameter.ndim > 0 or key == "step")
    return torch.float64 if counts else tensor.dtype


def _fresh(state: Mapping[str, Any], stepped: bool) -> dict[str, Any]:
    """Counters set back to zero when the state comes from a step that was taken."""
    return {
        k: torch.zeros_like(v) if stepped and isinstance(v, Tensor) and v.ndim == 0 else v for k, v in state.items()
    }


def _shadow(optimizer: Optimizer) -> Optimizer:
    """A copy of the optimizer over copies of its parameters, with zero gradients.

    Some optimizers of torch start from the learning rate (Rprop, ASGD); one that must take a step gets the rate zero.
    """
    shadow = copy.copy(optimizer)
    shadow.state = defaultdict(dict)
    shadow.param_groups = []
    for group in optimizer.param_groups:
        parameters = [torch.nn.Parameter(p.detach().clone(), p.requires_grad) for p in group["params"]]
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        switches = {k: v for k, v in _TRACEABLE.items() if k in group}
        rate = group["lr"] if hasattr(optimizer, "_init_group") else 0.0  # a step that is taken must change nothing
        shadow.param_groups.append({**group, **switches, "params": parameters, "lr": rate})
    # Adagrad and others fill the state when they are made.
    for group, own in zip(shadow.param_groups, optimizer.param_groups, strict=True):
        for parameter, original in zip(group["params"], own["params"], strict=True):
            if original in optimizer.state:
                shadow.state[parameter] = dict(optimizer.state[original])
    return shadow
