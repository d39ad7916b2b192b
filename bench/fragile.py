"""An operator that fails when asked to, as a user's own one might; members import it (`--imports bench.fragile`).

A file in the directory $MILLRACE_FAULTS is an order, which the process that takes it away carries out: "raise…" to
raise an error, "memory…" to ask for more memory than there is. In a process whose $MILLRACE_FIRST_S is set its first
call takes so many seconds, as the first run of a program may that is compiled then.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from pathlib import Path

import torch
from torch import Tensor

DIRECTORY = "MILLRACE_FAULTS"
FIRST_S = "MILLRACE_FIRST_S"
RAISE, MEMORY = "raise", "memory"
_TOO_MANY_BYTES = 1 << 44


@functools.cache  # once in a process
def _begin() -> None:
    time.sleep(float(os.environ.get(FIRST_S, "0")))


@torch.library.custom_op("millrace_bench::fragile", mutates_args=())
def fragile(x: Tensor) -> Tensor:
    """Its argument."""
    _begin()
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
