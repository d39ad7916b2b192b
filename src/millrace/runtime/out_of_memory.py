"""Whether an error means that a process has too little memory."""

from __future__ import annotations

import torch

_SAID_BY_TORCH = "can't allocate memory"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether it, or what it was raised from, is a refused allocation, of a CPU's memory or a GPU's."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or _SAID_BY_TORCH in str(error):
            return True
        error = error.__cause__
    return False
