"""An operator that fails when asked to, as a user's own one might; members import it (`--imports bench.fragile`).

A file in the directory $MILLRACE_FAULTS is an order, which the process that takes it away carries out: "raise…" to
raise an error, "memory…" to ask for more memory than there is.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch
from torch import Tensor

DIRECTORY = "MILLRACE_FAULTS"
RAISE, MEMORY = "raise", "memory"
_TOO_MANY_BYTES = 1 << 44


@torch.library.custom_op("millrace_bench::fragile", mutates_args=())
def fragile(x: Tensor) -> Tensor:
    """Its argument."""
    for name in os.listdir(os.environ[DIRECTORY]) if DIRECTORY in os.environ else []:
        with contextlib.suppress(FileNotFoundError):
            Path(os.environ[DIRECTORY], name).unlink()
            if name.startswith(MEMORY):
                torch.empty(_TOO_MANY_BYTES, dtype=torch.uint8)
            raise ValueError("the user's own operator failed, as it was asked to")
    return x.clone()


@fragile.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


fragile.register_autograd(lambda context, gradient: gradient)
