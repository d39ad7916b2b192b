"""An operator for tests, which members import (`--imports`): now and then it fails, or takes more memory than there is.

A file in the directory MILLRACE_TEST_FAULTS, "raise" or "memory" and anything, is taken by one process, which does so.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch
from torch import Tensor

TOO_MANY_BYTES = 1 << 44
DIRECTORY = "MILLRACE_TEST_FAULTS"


@torch.library.custom_op("millrace_test::fragile", mutates_args=())
def fragile(x: Tensor) -> Tensor:
    """Its argument, if nothing goes wrong."""
    for name in sorted(os.listdir(os.environ[DIRECTORY])) if DIRECTORY in os.environ else []:
        with contextlib.suppress(FileNotFoundError):
            Path(os.environ[DIRECTORY], name).unlink()
            if name.startswith("memory"):
                return x + torch.empty(TOO_MANY_BYTES, dtype=torch.uint8)
            raise ValueError("the user's own operator failed")
    return x.clone()


@fragile.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


fragile.register_autograd(lambda context, gradient: gradient)
