"""The CTC loss (Graves et al., "Connectionist temporal classification", ICML 2006) as a node.

PyTorch's kernel makes a table as wide as the longest target, which only the values of the lengths tell, so that it
cannot be traced. Here it is the node `millrace::ctc_loss`, whose table is as wide as the targets' tensor, and its
gradient is another; both are around PyTorch's kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
_MEAN, _SUM = 1, 2  # torch's numbers for the reductions

# Shape legend: T time, B batch, C classes, S length of the targets' tensor, A = 2 S + 1.


@torch.library.custom_op("millrace::ctc_loss", mutates_args=())
def ctc_losses(
    log_probs_TBC: Tensor, targets: Tensor, times_B: Tensor, lengths_B: Tensor, blank: int, zero_infinity: bool
) -> tuple[Tensor, Tensor]:
    """Negative log likelihood of each sequence [B], and the kernel's table of log alpha [B, T, A].

    `targets` is [B, S], or the sequences one after another, [total]; then the table is left out, and made once more
    for the gradient. With `zero_infinity` an impossible alignment, whose loss is infinite, has the gradient zero.
    """
    losses_B, table = aten._ctc_loss.Tensor(log_probs_TBC, targets, times_B, lengths_B, blank, zero_infinity)
    width = _width(targets)
    return losses_B, F.pad(table, (0, width - table.shape[-1])) if width else table.new_empty(0)


@ctc_losses.register_fake
def _(
    log_probs_TBC: Tensor, targets: Tensor, times_B: Tensor, lengths_B: Tensor, blank: int, zero_infinity: bool
) -> tuple[Tensor, Tensor]:
    time, batch, _ = log_probs_TBC.shape
    width = _width(targets)
    table = log_probs_TBC.new_empty(batch, time, width) if width else log_probs_TBC.new_empty(0)
    return log_probs_TBC.new_empty(batch), table


def _width(targets: Tensor) -> int:
    return 2 * targets.shape[-1] + 1 if targets.ndim == 2 else 0


@torch.library.custom_op("millrace::ctc_loss_backward", mutates_args=())
def ctc_losses_backward(
    gradient_B: Tensor,
    log_probs_TBC: Tensor,
    targets: Tensor,
    times_B: Tensor,
    lengths_B: Tensor,
    losses_B: Tensor,
    table: Tensor,
    blank: int,
    zero_infinity: bool,
) -> Tensor:
    """Gradient of the log probabilities [T, B, C]."""
    if table.ndim == 3:
        table = table[..., : 2 * int(lengths_B.max()) + 1].contiguous()
    else:
        _, table = aten._ctc_loss.Tensor(log_probs_TBC, targets, times_B, lengths_B, blank, zero_infinity)
    return aten._ctc_loss_backward.Tensor(
        gradient_B, log_probs_TBC, targets, times_B, lengths_B, losses_B, table, blank, zero_infinity
    ).contiguous()


@ctc_losses_backward.register_fake
def _(
    gradient_B: Tensor,
    log_probs_TBC: Tensor,
    targets: Tensor,
    times_B: Tensor,
    lengths_B: Tensor,
    losses_B: Tensor,
    table: Tensor,
    blank: int,
    zero_infinity: bool,
) -> Tensor:
    return log_probs_TBC.new_empty(log_probs_TBC.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.blank, ctx.zero_infinity = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradient(ctx: Any, gradient_B: Tensor, _table: Tensor | None) -> tuple[Tensor | None, ...]:
    found = torch.ops.millrace.ctc_loss_backward(gradient_B, *ctx.saved_tensors, ctx.blank, ctx.zero_infinity)
    return found, None, None, None, None, None


ctc_losses.register_autograd(_gradient, setup_context=_save)


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int = 0,
    reduction: int = _MEAN,
    zero_infinity: bool = False,
) -> Tensor:
    """`torch.ctc_loss`, with the kernel's part as a node. Arguments and result as torch's."""
    single = log_probs.ndim == 2
    log_probs_TBC = log_probs.unsqueeze(1) if single else log_probs
    device = log_probs.device
    times_B = torch.as_tensor(input_lengths, dtype=torch.int64, device=device).reshape(-1)
    lengths_B = torch.as_tensor(target_lengths, dtype=torch.int64, device=device).reshape(-1)
    losses_B, _ = torch.ops.millrace.ctc_loss(log_probs_TBC, targets, times_B, lengths_B, blank, zero_infinity)
    if zero_infinity:
        losses_B = torch.where(losses_B == torch.inf, 0.0, losses_B)
    if reduction == _MEAN:
        return (losses_B / lengths_B.clamp(min=1)).mean()
    if reduction == _SUM:
        return losses_B.sum()
    return losses_B.squeeze(0) if single else losses_B
