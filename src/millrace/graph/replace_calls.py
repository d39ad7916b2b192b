"""Calls that a traced step makes in another way than it was written, for the same result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode

from millrace.graph.closures import bodies_within, call_without_closures
from millrace.graph.lstm import fits, lstm
from millrace.graph.stand_ins import ATTENTION, attention


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
        if func is torch.lstm and fits(args):
            return lstm(*args)
        scale = kwargs.get("alpha", kwargs.get("value"))
        if isinstance(scale, Tensor) and getattr(func, "__name__", "") in _SCALED:
            # A learning rate is a variable, but these arguments are numbers to ATen: multiply instead.
            rest = {key: value for key, value in kwargs.items() if key not in ("alpha", "value")}
            return func(args[0], args[1] * scale, *args[2:], **rest)
        return func(*args, **kwargs)


# Functions of the form self + scale * first (* or / second).
_SCALED = {"add", "add_", "sub", "sub_", "addcmul", "addcmul_", "addcdiv", "addcdiv_"}
