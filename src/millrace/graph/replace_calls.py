"""Calls that a traced step makes in another way than it was written, for the same result."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from millrace.graph.closures import bodies_within, call_without_closures
from millrace.graph.lstm import fits, lstm


class ReplacedCalls(TorchFunctionMode):
    """Intercepts a few functions of torch above autograd, while a step is traced."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return call_without_closures(func, bodies_within(self, [*args, *kwargs.values()]))
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is torch.lstm and fits(args):
            return lstm(*args)
        if func is torch.embedding:
            return _embedding(*args, **kwargs)
        scale = kwargs.get("alpha", kwargs.get("value"))
        if isinstance(scale, Tensor) and getattr(func, "__name__", "") in _SCALED:
            # A learning rate is a variable, but these arguments are numbers to ATen: multiply instead.
            rest = {key: value for key, value in kwargs.items() if key not in ("alpha", "value")}
            return func(args[0], args[1] * scale, *args[2:], **rest)
        return func(*args, **kwargs)


# Functions of the form self + scale * first (* or / second).
_SCALED = {"add", "add_", "sub", "sub_", "addcmul", "addcmul_", "addcdiv", "addcdiv_"}


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **rest: Any
) -> Tensor:
    # The fused kernels draw their dropout masks from a generator inside the kernel; the unfused one draws in ATen.
    if dropout_p:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **rest)
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **rest)


def _embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    # A sparse gradient is a Python object, not a node. The dense gradient in the graph becomes an update of the touched
    # rows in `passes/sparse_rows.py`.
    return torch.embedding(weight, indices, padding_idx, scale_grad_by_freq, False)
