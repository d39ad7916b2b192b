"""What an update rule is: a pure function from (parameter, gradient, state) to (new parameter, new state).

Rules are traced into the graph of the training step, so they use tensor operations only, never look at a
tensor's value from Python, and never write into their arguments. Two habits make the traced form cheap to run:

- The scalars that all parameters share (learning rate, bias corrections) are computed once per step in `Rule.at`,
  not once per parameter; the small tensors that come out of it are 0-dim.
- A new value is a chain of operations whose first argument leads back to the old value
  (`parameter.mul(decay).addcdiv(...)`), so that a later pass can run the chain in place.
"""

from __future__ import annotations

import abc
from collections.abc import Callable

import torch
from torch import Tensor

State = dict[str, Tensor]
"""What a rule remembers of one parameter, by slot name."""

Update = Callable[[Tensor, Tensor, State], tuple[Tensor, State]]
"""(parameter, gradient, state) to (new parameter, new state)."""


class Rule(abc.ABC):
    """One update rule with its constants, as a frozen dataclass; learning rate and weight decay come from outside.

    Subclasses are final. They name their slots and write `at`; those whose state does not start at zero write
    `init` too. Weight decay is an argument, kept in one place (the `Optimizer`, per group); the rule decides what
    it means: coupled (added to the gradient) or decoupled (shrinks the parameter).
    """

    @property
    @abc.abstractmethod
    def slots(self) -> tuple[str, ...]:
        """Names of the state tensors kept for each parameter."""

    @abc.abstractmethod
    def at(self, *, learning_rate: Tensor, step: Tensor, weight_decay: float, dtype: torch.dtype) -> Update:
        """The update of one step, to be applied to every parameter of a group.

        Args:
            learning_rate: 0-dim floating tensor.
            step: 0-dim int64 tensor, the number of updates applied before this one.
            weight_decay: in the rule's own sense.
            dtype: what the arithmetic is done in; the returned function is given tensors of this dtype.

        """

    def init(self, parameter: Tensor) -> State:
        """The state before the first update: by default zeros like the parameter in every slot."""
        return {slot: torch.zeros_like(parameter) for slot in self.slots}

    @torch.no_grad()
    def update(
        self,
        parameter: Tensor,
        gradient: Tensor,
        state: State,
        *,
        learning_rate: Tensor,
        step: Tensor,
        weight_decay: float = 0.0,
    ) -> tuple[Tensor, State]:
        """One update of one parameter; for many parameters call `at` once and `apply_update` for each.

        Args:
            parameter: floating tensor of any shape.
            gradient: of the same shape.
            state: as `init` or an earlier update returned it.
            learning_rate: 0-dim floating tensor.
            step: 0-dim int64 tensor, the number of updates applied before this one.
            weight_decay: in the rule's own sense.

        Returns:
            The new parameter and the new state, in the dtypes of the old ones.

        """
        dtype = arithmetic_dtype(parameter.dtype)
        update = self.at(learning_rate=learning_rate, step=step, weight_decay=weight_decay, dtype=dtype)
        return apply_update(update, parameter, gradient, state)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a parameter's update is computed in: float64 for float64, float32 for all that is narrower.

    In bfloat16, 0.999 rounds to 1 and a small step is lost; computed in float32, only the stored result is rounded.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def apply_update(update: Update, parameter: Tensor, gradient: Tensor, state: State) -> tuple[Tensor, State]:
    """Run `update` in the parameter's arithmetic dtype; results come back in the dtypes of the old values."""
    wide = arithmetic_dtype(parameter.dtype)
    wide_state = {slot: value.to(wide) for slot, value in state.items()}
    new_parameter, new_state = update(parameter.to(wide), gradient.to(wide), wide_state)
    narrow_state = {slot: value.to(state[slot].dtype) for slot, value in new_state.items()}
    return new_parameter.to(parameter.dtype), narrow_state


def coupled_decay(gradient: Tensor, parameter: Tensor, weight_decay: float) -> Tensor:
    """The gradient of the loss plus `weight_decay`/2 times the squared norm of the parameter."""
    return gradient.add(parameter, alpha=weight_decay) if weight_decay else gradient


def decoupled_decay(learning_rate: Tensor, weight_decay: float, dtype: torch.dtype) -> Tensor:
    """The 0-dim factor 1 - learning_rate * weight_decay that shrinks a parameter.

    Computed in float64 and rounded once: the same factor multiplies the parameter at every step, so that an error
    in its last bit adds up (50 steps: 3e-6 relative in float32).
    """
    return (1.0 - learning_rate.to(torch.float64) * weight_decay).to(dtype)
