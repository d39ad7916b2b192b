"""LSTM layers as single nodes, for models that are traced on the CPU.

PyTorch's oneDNN kernel runs a whole layer over time at once, but hides the size of its workspace from shape
propagation; written out in ATen, a layer is some forty nodes for every step of time, slower and long to compile. Here
a layer is the node `millrace::lstm_layer` and its gradient another, both around PyTorch's kernel. On a device of
another kind the two nodes call `torch.lstm`, which takes that device's kernel; the gradient computes the layer anew.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten
_LSTM = 2  # the kernel's number for this kind of cell

# Shape legend: T time, B batch, I input width, H hidden width, G = 4 H gates.


@torch.library.custom_op("millrace::lstm_layer", mutates_args=())
def lstm_layer(
    x_TBI: Tensor,
    w_GI: Tensor,
    w_GH: Tensor,
    b_G: Tensor,
    c_G: Tensor,
    h_BH: Tensor,
    c_BH: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One direction of one layer: outputs [T, B, H], last h and c [B, H], and the kernel's workspace [bytes]."""
    if not _has_kernel(x_TBI):
        time, batch, width = x_TBI.shape
        size = _workspace_bytes(time, batch, width, h_BH.shape[-1], x_TBI.dtype)  # as the graph says; nobody reads it
        layer = _layer_elsewhere(x_TBI, (w_GI, w_GH, b_G, c_G), h_BH, c_BH, reverse)
        return *layer, x_TBI.new_empty(size, dtype=torch.uint8)
    # The kernel leaves the workspace out unless gradients are on.
    with torch.enable_grad():
        found = aten.mkldnn_rnn_layer(
            x_TBI, w_GI, w_GH, b_G, c_G, h_BH, c_BH, reverse, [], _LSTM, h_BH.shape[-1], 1, True, False, False, True
        )
    # The kernel's last state is a view of its outputs.
    return found[0], found[1].clone(), found[2].clone(), found[3]


def _has_kernel(x_TBI: Tensor) -> bool:
    return x_TBI.device.type == "cpu"


def _layer_elsewhere(
    x_TBI: Tensor, weights: Sequence[Tensor], h_BH: Tensor, c_BH: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, last h and last c by `torch.lstm`."""
    x_TBI = x_TBI.flip(0) if reverse else x_TBI
    # cuDNN has no gradient but for training.
    y_TBH, h_1BH, c_1BH = torch.lstm(x_TBI, (h_BH[None], c_BH[None]), list(weights), True, 1, 0.0, True, False, False)
    return y_TBH.flip(0) if reverse else y_TBH.clone(), h_1BH[0].clone(), c_1BH[0].clone()


@lstm_layer.register_fake
def _(
    x_TBI: Tensor, w_GI: Tensor, w_GH: Tensor, b_G: Tensor, c_G: Tensor, h_BH: Tensor, c_BH: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    time, batch, width = x_TBI.shape
    hidden = h_BH.shape[-1]
    size = _workspace_bytes(int(time), int(batch), int(width), int(hidden), x_TBI.dtype)
    return (
        x_TBI.new_empty(time, batch, hidden),
        torch.empty_like(h_BH),
        torch.empty_like(c_BH),
        x_TBI.new_empty(size, dtype=torch.uint8),
    )


@functools.cache
def _workspace_bytes(time: int, batch: int, width: int, hidden: int, dtype: torch.dtype) -> int:
    """Ask the kernel itself, with real tensors: the size is its secret and depends on the processor."""
    with _disable_current_modes(), torch.backends.mkldnn.flags(enabled=True):
        make = functools.partial(torch.zeros, dtype=dtype)
        gates = 4 * hidden
        weights = (make(gates, width), make(gates, hidden), make(gates), make(gates))
        state = make(batch, hidden)
        return int(torch.ops.millrace.lstm_layer(make(time, batch, width), *weights, state, state, False)[3].numel())


@torch.library.custom_op("millrace::lstm_layer_backward", mutates_args=())
def lstm_layer_backward(
    x_TBI: Tensor,
    weights: Sequence[Tensor],
    h_BH: Tensor,
    c_BH: Tensor,
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, four weights, h and c. outputs: the four of the layer; gradients: of the first three."""
    if not _has_kernel(x_TBI):

        def layer(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return _layer_elsewhere(x, rest[:4], rest[4], rest[5], reverse)

        # Inside an operator there is no autograd; a function transform makes its own.
        with torch.enable_grad():
            found = torch.func.vjp(layer, x_TBI, *weights, h_BH, c_BH)[1](tuple(gradients))
        dx, dw_GI, dw_GH, db_G, dc_G, dh_BH, dc_BH = (gradient.clone() for gradient in found)
        return dx, dw_GI, dw_GH, db_G, dc_G, dh_BH, dc_BH
    y, last_h, last_c, workspace = outputs
    hidden = h_BH.shape[-1]
    found = aten.mkldnn_rnn_layer_backward(
        x_TBI, *weights, h_BH, c_BH, y, last_h, last_c, *(g.contiguous() for g in gradients),
        reverse, _LSTM, hidden, 1, True, True, False, [], False, workspace,
    )  # fmt: skip
    # Both biases get the same gradient tensor; a node's results may not share memory.
    return (*found[:4], found[4].clone(), *found[5:7])


@lstm_layer_backward.register_fake
def _(
    x_TBI: Tensor,
    weights: Sequence[Tensor],
    h_BH: Tensor,
    c_BH: Tensor,
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    reverse: bool,
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) for t in (x_TBI, *weights, h_BH, c_BH))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, reverse = inputs
    ctx.reverse = reverse
    ctx.save_for_backward(*tensors, *output)


def _gradient(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    x_TBI, weights, (h_BH, c_BH), outputs = saved[0], saved[1:5], saved[5:7], saved[7:]
    known = [
        torch.zeros_like(output) if gradient is None else gradient
        for gradient, output in zip(gradients[:3], outputs[:3], strict=True)
    ]
    found = torch.ops.millrace.lstm_layer_backward(x_TBI, list(weights), h_BH, c_BH, list(outputs), known, ctx.reverse)
    return (*found, None)


lstm_layer.register_autograd(_gradient, setup_context=_save)


def fits(arguments: Sequence[Any]) -> bool:
    """Whether the kernel takes a call of `torch.lstm`: padded, CPU, float32 or bfloat16, with biases, no projection."""
    if len(arguments) != 9 or not isinstance(arguments[3], bool):
        return False  # the packed-sequence form
    x, state, weights, has_biases, layers, _, _, bidirectional, _ = arguments
    return (
        x.device.type == "cpu"
        and x.ndim == 3
        and has_biases
        and len(weights) == 4 * layers * (2 if bidirectional else 1)
        and all(_dtype(t) is _dtype(x) for t in (*state, *weights))
        and torch.backends.mkldnn.is_available()
        and (_dtype(x) == torch.float32 or (_dtype(x) == torch.bfloat16 and _has_bfloat16()))
    )


@functools.cache
def _has_bfloat16() -> bool:
    """Whether this processor's kernel computes in bfloat16."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _dtype(tensor: Tensor) -> torch.dtype:
    """In which PyTorch would compute with it: autocast makes every float32 the lower precision."""
    lowered = tensor.dtype == torch.float32 and torch.is_autocast_enabled("cpu")
    return torch.get_autocast_dtype("cpu") if lowered else tensor.dtype


def lstm(
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.lstm` of one layer, each direction one node. Arguments and results as `torch.lstm`'s."""
    dtype = _dtype(x)
    x_TBI = (x.transpose(0, 1) if batch_first else x).contiguous().to(dtype)
    state, weights = [t.to(dtype) for t in state], [t.to(dtype) for t in weights]
    found, last_h, last_c = [], [], []
    for direction in range(2 if bidirectional else 1):
        own = weights[4 * direction : 4 * direction + 4]
        h_BH, c_BH = (t[direction].contiguous() for t in state)
        y, h, c, _ = torch.ops.millrace.lstm_layer(x_TBI, *own, h_BH, c_BH, bool(direction))
        found.append(y)
        last_h.append(h)
        last_c.append(c)
    y_TBH = torch.cat(found, -1) if bidirectional else found[0]
    return y_TBH.transpose(0, 1) if batch_first else y_TBH, torch.stack(last_h), torch.stack(last_c)
