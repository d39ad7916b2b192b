"""Calls that a traced step makes in another way than it was written, for the same result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode

from millrace.errors import TraceError
from millrace.graph.closures import bodies_within, call_without_closures
from millrace.graph.lstm import fits, lstm
from millrace.graph.stand_ins import ATTENTION, attention
from millrace.graph.user_code import user_line


class ReplacedCalls(TorchFunctionMode):
    """Intercepts a few functions of torch above autograd, while a step is traced."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return call_without_closures(func, bodies_within(self, [*args, *kwargs.values()]))
        if func is ATTENTION:  # imported by its name
            return attention(*args, **kwargs)
        if func is torch._pack_padded_sequence:
            raise TraceError(
                f"{user_line()}: a packed sequence has as many rows as the lengths say, and a graph is made before "
                "they are known.\n  Way out: leave the batch padded, and mask the loss where a sequence has ended."
            )
        if func is torch.lstm and fits(args):
            return lstm(*args)
        scale = kwargs.get("alpha", kwargs.get("value"))
        if isinstance(scale, Tensor) and getattr(func, "__name__", "") in _SCALED and len(args) > 1:
            # A learning rate is a variable, but these arguments are numbers to ATen: multiply instead.
            rest = {key: value for key, value in kwargs.items() if key not in ("alpha", "value")}
            return func(args[0], _wide(args[1], args[0]) * scale, *args[2:], **rest)
        return func(*args, **kwargs)


# Functions of the form self + scale * first (* or / second).
_SCALED = {"add", "add_", "sub", "sub_", "addcmul", "addcmul_", "addcdiv", "addcdiv_"}


def _wide(factor: Any, target: Any) -> Any:
    """`factor` in the precision in which `target + scale * factor` is computed (Muon adds bfloat16 to float32)."""
    if not isinstance(factor, Tensor) or not isinstance(target, Tensor):
        return factor
    return factor.to(torch.promote_types(factor.dtype, target.dtype))
