"""An optimizer: one rule over many named parameters, with everything that surrounds a rule.

The order of one call: sum gradients (`accumulate`), clip the sum's mean (`clip_norm`), look up each parameter's group,
compute the group's rate and scalars once, update each parameter, move its average (`average`). All of it becomes part
of the step's graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import final

import torch
from torch import Tensor

from millrace.errors import SettingError, did_you_mean
from millrace.optim.average import AVERAGE_SLOT, moved
from millrace.optim.base import Rule, State, Update, apply_update, arithmetic_dtype
from millrace.optim.checks import check_count, check_number
from millrace.optim.clip import clip_by_global_norm
from millrace.optim.schedule import Schedule, check_rate

# The slot, beside the rule's own, in which `accumulate` keeps the sum of gradients.
_SUM_SLOT = "gradient_sum"


@final
@dataclass(frozen=True)
class Group:
    """Other settings for the parameters whose name matches a shell-style pattern such as "*.bias".

    Args:
        pattern: as in `fnmatch`, case-sensitive; "*" also matches dots.
        learning_rate: replaces the optimizer's; None keeps it.
        scale: multiplies the learning rate; at least 0.
        weight_decay: replaces the optimizer's; None keeps it.

    """

    pattern: str
    learning_rate: float | Schedule | None = None
    scale: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise SettingError(f"Group: pattern must be a string such as '*.bias', got {self.pattern!r}.")
        if self.learning_rate is not None:
            check_rate("Group", "learning_rate", self.learning_rate)
        check_number("Group", "scale", self.scale)
        if self.weight_decay is not None:
            check_number("Group", "weight_decay", self.weight_decay)


@final
@dataclass(frozen=True)
class Optimizer:
    """A rule, its learning rate, and how gradients are accumulated, clipped and grouped.

    Weight decay is kept here and in the groups, nowhere else; the rule gives it its meaning (torch's for that rule).

    Args:
        rule: what happens to one parameter.
        learning_rate: a number, or a schedule over applied updates.
        weight_decay: at least 0.
        clip_norm: bound on the global norm of the gradients that reach the rule; None for no bound.
        accumulate: apply every k-th call, on the mean of k gradients.
        groups: exceptions for some parameters; the first that matches a name counts.
        average: keep a running average of every parameter that is updated, decaying by this factor (such as 0.999) at
            every applied update; `fit` evaluates the averages, and leaves them in the model. None for no averages.

    """

    rule: Rule
    learning_rate: float | Schedule
    weight_decay: float = 0.0
    clip_norm: float | None = None
    accumulate: int = 1
    groups: tuple[Group, ...] = ()
    average: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule):
            raise SettingError(f"Optimizer: rule must be a Rule, such as Adam(), got {self.rule!r}.")
        owner = type(self.rule).__name__
        check_rate(owner, "learning_rate", self.learning_rate)
        check_number(owner, "weight_decay", self.weight_decay)
        if self.clip_norm is not None:
            check_number(owner, "clip_norm", self.clip_norm, low_open=True)
        check_count(owner, "accumulate", self.accumulate)
        if self.average is not None:
            check_number(owner, "average", self.average, high=1.0)
        if not isinstance(self.groups, tuple) or not all(isinstance(group, Group) for group in self.groups):
            raise SettingError(f"{owner}: groups must be a tuple of Group, got {self.groups!r}.")

    def init(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state before the first call, by flat name "optimizer/<parameter name>/<slot>".

        Args:
            parameters: real floating tensors by name; all that will ever be updated.

        Raises:
            SettingError: a parameter is not real and floating, or a group's pattern matches no parameter.

        """
        for group in self.groups:
            if not any(fnmatchcase(name, group.pattern) for name in parameters):
                hint = did_you_mean(group.pattern, list(parameters))
                raise SettingError(f"Group: pattern {group.pattern!r} matches no parameter. {hint}")
        state: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            if not parameter.is_floating_point():
                raise SettingError(
                    f"Optimizer: parameter {name!r} must be real and floating to be updated, got {parameter.dtype}; "
                    f"leave it out of the parameters."
                )
            for slot, value in self.rule.init(parameter).items():
                state[_slot_name(name, slot)] = value
            if self.accumulate > 1:
                # Sums of bfloat16 values lose what is small beside the sum, so they are kept wide.
                zeros = torch.zeros_like(parameter, dtype=arithmetic_dtype(parameter.dtype))
                state[_slot_name(name, _SUM_SLOT)] = zeros
            if self.average is not None:
                copy = parameter.detach().to(arithmetic_dtype(parameter.dtype), copy=True)
                state[_slot_name(name, AVERAGE_SLOT)] = copy
        return state

    def learning_rate_at(self, step: Tensor) -> Tensor:
        """The learning rate, before groups, that call number `step` (0-dim int64 tensor) uses: 0-dim."""
        return _rate(self.learning_rate, step // self.accumulate, torch.float32)

    @torch.no_grad()
    def update(
        self,
        parameters: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor | None],
        state: Mapping[str, Tensor],
        step: Tensor,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One call: new parameters and new state, of the same names, shapes and dtypes. Nothing is written in place.

        Args:
            parameters: by name, as given to `init`.
            gradients: by parameter name; a parameter that is absent (or None) comes back as the same object, and so
                does its state. Sparse gradients are made dense.
            state: as `init` or an earlier call returned it.
            step: 0-dim int64 tensor, the number of calls before this one; rules and schedules see `step // accumulate`.

        Raises:
            SettingError: a gradient of an unknown parameter or of another shape, or a state that lacks a slot.

        """
        _check_call(parameters, gradients, step)
        given = {
            name: _wide(gradient, parameters[name]) for name, gradient in gradients.items() if gradient is not None
        }
        if self.accumulate == 1:
            return self._apply(parameters, given, state, step)
        return self._accumulate(parameters, given, state, step)

    def _accumulate(
        self, parameters: Mapping[str, Tensor], gradients: dict[str, Tensor], state: Mapping[str, Tensor], step: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Add to the sums; an update on their mean is always computed, and kept only at every k-th call."""
        is_last = step % self.accumulate == self.accumulate - 1
        sums = {name: _slot(state, name, _SUM_SLOT).add(gradient) for name, gradient in gradients.items()}
        means = {name: total / self.accumulate for name, total in sums.items()}
        applied_parameters, applied_state = self._apply(parameters, means, state, step // self.accumulate)
        new_parameters = _chosen(is_last, applied_parameters, parameters)
        new_state = _chosen(is_last, applied_state, state)
        for name, total in sums.items():
            new_state[_slot_name(name, _SUM_SLOT)] = total.masked_fill(is_last.to(total.device), 0.0)
        return new_parameters, new_state

    def _apply(
        self, parameters: Mapping[str, Tensor], gradients: dict[str, Tensor], state: Mapping[str, Tensor], step: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Clip, then run the rule; `step` counts applied updates."""
        if self.clip_norm is not None:
            gradients, _ = clip_by_global_norm(gradients, self.clip_norm)
        new_parameters, new_state = dict(parameters), dict(state)
        shared: dict[tuple[int | None, torch.dtype, torch.device], Update] = {}
        for name, gradient in gradients.items():
            parameter = parameters[name]
            key = (self._group_index(name), arithmetic_dtype(parameter.dtype), parameter.device)
            if key not in shared:
                shared[key] = self._at(*key, step)
            slots: State = {slot: _slot(state, name, slot) for slot in self.rule.slots}
            new_parameters[name], new_slots = apply_update(shared[key], parameter, gradient, slots)
            for slot, value in new_slots.items():
                new_state[_slot_name(name, slot)] = value
            if self.average is not None:
                average = _slot(state, name, AVERAGE_SLOT)
                new_state[_slot_name(name, AVERAGE_SLOT)] = moved(average, new_parameters[name], self.average, step)
        return new_parameters, new_state

    def _group_index(self, name: str) -> int | None:
        return next((i for i, group in enumerate(self.groups) if fnmatchcase(name, group.pattern)), None)

    def _at(self, group_index: int | None, dtype: torch.dtype, device: torch.device, step: Tensor) -> Update:
        """The rule's update at `step` with a group's settings; the scalars in it live on `device`."""
        group = Group("*") if group_index is None else self.groups[group_index]
        step = step.to(device)
        rate = _rate(self.learning_rate if group.learning_rate is None else group.learning_rate, step, dtype)
        if group.scale != 1.0:
            rate = rate * group.scale
        weight_decay = self.weight_decay if group.weight_decay is None else group.weight_decay
        return self.rule.at(learning_rate=rate, step=step, weight_decay=weight_decay, dtype=dtype)


def _rate(learning_rate: float | Schedule, step: Tensor, dtype: torch.dtype) -> Tensor:
    """The rate as a 0-dim tensor; a constant one in float64, where a compiler folds what is computed from it."""
    if callable(learning_rate):
        rate = learning_rate(step.to(dtype))
        if not isinstance(rate, Tensor) or rate.dim() != 0 or not rate.is_floating_point():
            raise SettingError(f"Optimizer: a schedule must return a 0-dim floating tensor, got {rate!r}.")
        return rate
    return torch.full((), float(learning_rate), dtype=torch.float64, device=step.device)


def _wide(gradient: Tensor, parameter: Tensor) -> Tensor:
    dense = gradient if gradient.layout == torch.strided else gradient.to_dense()
    return dense.to(arithmetic_dtype(parameter.dtype))


def _chosen(condition: Tensor, new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`new` where the 0-dim condition holds, else `old`; what did not change stays the same object."""
    return {
        name: old[name] if value is old[name] else torch.where(condition.to(value.device), value, old[name])
        for name, value in new.items()
    }


def _slot_name(parameter: str, slot: str) -> str:
    return f"optimizer/{parameter}/{slot}"


def _slot(state: Mapping[str, Tensor], parameter: str, slot: str) -> Tensor:
    try:
        return state[_slot_name(parameter, slot)]
    except KeyError:
        raise SettingError(
            f"Optimizer: state must hold {_slot_name(parameter, slot)!r}; give `update` the state that `init` made "
            f"for these parameters. {did_you_mean(_slot_name(parameter, slot), list(state))}"
        ) from None


def _check_call(parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None], step: Tensor) -> None:
    if step.dim() != 0 or step.is_floating_point():
        raise SettingError(
            f"Optimizer: step must be a 0-dim integer tensor, got shape {list(step.shape)} of {step.dtype}."
        )
    for name, gradient in gradients.items():
        if name not in parameters:
            hint = did_you_mean(name, list(parameters))
            raise SettingError(f"Optimizer: there is a gradient for {name!r}, which is no parameter. {hint}")
        if gradient is not None and gradient.shape != parameters[name].shape:
            raise SettingError(
                f"Optimizer: the gradient of {name!r} must have the parameter's shape "
                f"{list(parameters[name].shape)}, got {list(gradient.shape)}."
            )
