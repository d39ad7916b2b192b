"""An operator that says which indices may come: for lookups whose table is divided, and which therefore cannot tell.

A block of a table sees indices of all blocks and takes those of others for nothing. So the range of the whole table is
checked once, before the blocks. A session looks for the same ranges in the batch before the step runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SCHEMA = "(Tensor index, int low, int high, int? ignored) -> Tensor"


@torch.library.custom_op("millrace::checked_index", mutates_args=(), schema=_SCHEMA)
def _checked_index(index: Tensor, low: int, high: int, ignored: int | None) -> Tensor:
    # Looking at values on a GPU would wait for it; there, as in a compiled step, only the session looks.
    if index.device.type == "cpu" and index.numel():
        wrong = (index < low) | (index > high)
        if ignored is not None:
            wrong &= index != ignored
        if bool(wrong.any()):
            raise IndexError(f"index {int(index[wrong][0])} is out of range: expected {low} to {high}")
    return index.clone()


@_checked_index.register_fake
def _(index: Tensor, low: int, high: int, ignored: int | None) -> Tensor:
    return torch.empty_like(index)


checked_index = torch.ops.millrace.checked_index.default
