"""Calls that a traced step makes in another way than it was written, for the same result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode

from millrace.errors import TraceError
from millrace.graph.signature import TensorSpec
from millrace.graph.tracing.closures import bodies_within, call_without_closures
from millrace.graph.tracing.recurrent import RECURRENT, recurrent
from millrace.graph.tracing.refusals import PRINTED
from millrace.graph.tracing.stand_ins import ATTENTION, GAUSSIAN_LOSS, RRELU, attention, gaussian_nll_loss, rrelu
from millrace.graph.tracing.user_code import user_line


class ReplacedCalls(TorchFunctionMode):
    """Intercepts a few functions of torch above autograd, while a step is traced."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return call_without_closures(func, bodies_within(self, [*args, *kwargs.values()]))
        if func in _IMPORTED_BY_NAME:
            return _IMPORTED_BY_NAME[func](*args, **kwargs)
        if func in _FORMATTING:
            raise TraceError(f"{user_line()}: {PRINTED}")
        if func == _SET_DATA:  # made anew each time
            return _set_data(*args)
        if func is Tensor.fill_diagonal_:
            return _fill_diagonal(*args, **kwargs)
        if func is torch._pack_padded_sequence:
            raise TraceError(
                f"{user_line()}: a packed sequence has as many rows as the lengths say, and a graph is made before "
                "they are known.\n  Way out: leave the batch padded, and mask the loss where a sequence has ended."
            )
        if func in RECURRENT and not kwargs:
            return recurrent(func, *args)
        scale = kwargs.get("alpha", kwargs.get("value"))
        if isinstance(scale, Tensor) and getattr(func, "__name__", "") in _SCALED and len(args) > 1:
            # A learning rate is a variable, but these arguments are numbers to ATen: multiply instead.
            rest = {key: value for key, value in kwargs.items() if key not in ("alpha", "value")}
            return func(args[0], _wide(args[1], args[0]) * scale, *args[2:], **rest)
        return func(*args, **kwargs)


_IMPORTED_BY_NAME: dict[Any, Callable[..., Any]] = {
    ATTENTION: attention,
    GAUSSIAN_LOSS: gaussian_nll_loss,
    RRELU: rrelu,
}
_FORMATTING = {Tensor.__repr__, Tensor.__format__}
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


def _set_data(tensor: Tensor, value: Tensor) -> None:
    """`tensor.data = value`: the tracer does not see a tensor that changes its memory, so the values are copied."""
    if tensor.shape != value.shape or tensor.dtype != value.dtype:
        raise TraceError(
            f"{user_line()}: `.data` is {TensorSpec.of(tensor)} and is given {TensorSpec.of(value)}. "
            "A tensor of a traced step keeps its shape and dtype; make a new one instead."
        )
    with torch.no_grad():
        tensor.detach().copy_(value)


def _fill_diagonal(tensor: Tensor, fill_value: float, wrap: bool = False) -> Tensor:
    """`fill_diagonal_`, which torch makes of strides that cannot be followed, by indices instead."""
    width = tensor.shape[-1]
    index: tuple[Tensor, ...]
    count = min(tensor.shape)
    if tensor.ndim == 2 and wrap:
        positions = torch.arange(0, tensor.numel(), width + 1, device=tensor.device)
        index = (positions // width, positions % width)
    else:
        index = (torch.arange(count, device=tensor.device),) * tensor.ndim
    tensor[index] = fill_value
    return tensor


# Functions of the form self + scale * first (* or / second).
_SCALED = {"add", "add_", "sub", "sub_", "addcmul", "addcmul_", "addcdiv", "addcdiv_"}


def _wide(factor: Any, target: Any) -> Any:
    """`factor` in the precision in which `target + scale * factor` is computed (Muon adds bfloat16 to float32)."""
    if not isinstance(factor, Tensor) or not isinstance(target, Tensor):
        return factor
    return factor.to(torch.promote_types(factor.dtype, target.dtype))
