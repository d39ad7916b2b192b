"""How many floating-point operations a node takes, where that is what decides its time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.utils.flop_counter import flop_registry


def node_flops(node: Node) -> float:
    """Of a matrix product, a convolution, attention or a recurrent layer; 0 for a few operations per element.

    Infinite where there is a formula but not for these arguments.
    """
    own = _OWN.get(node.target._schema.name) if isinstance(node.target, OpOverload) else None
    if own is not None:
        return own(*torch.fx.node.map_arg(node.args, lambda n: n.meta.get("val")))
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if formula is None:
        return 0.0
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    try:
        return float(formula(*args, **kwargs, out_val=node.meta.get("val")))
    except (TypeError, ValueError, AttributeError, AssertionError):
        return math.inf


def _lstm(x_TBI: Tensor, w_GI: Tensor, w_GH: Tensor, *_: Any) -> float:
    time, batch, _width = x_TBI.shape
    return 2.0 * time * batch * (w_GI.numel() + w_GH.numel())


def _lstm_backward(x_TBI: Tensor, weights: Any, *_: Any) -> float:
    return 2.0 * _lstm(x_TBI, weights[0], weights[1])  # of the inputs and of the weights


def _attention(q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, *_: Any) -> float:
    batch, heads, length, width = q_BHLD.shape
    return 2.0 * batch * heads * length * k_BHSD.shape[2] * (width + v_BHSD.shape[3])


def _attention_backward(_gradient: Tensor, q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, *_: Any) -> float:
    return 2.5 * _attention(q_BHLD, k_BHSD, v_BHSD)  # five products where there were two: the scores are made again


# What the registry of torch lacks.
_OWN: dict[str, Callable[..., float]] = {
    "millrace::lstm_layer": _lstm,
    "millrace::lstm_layer_backward": _lstm_backward,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}
