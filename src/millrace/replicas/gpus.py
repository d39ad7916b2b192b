"""Which GPU of its machine each worker computes on."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection, Sequence

import torch

from millrace.runtime.device_worker import take_gpu


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, in PyTorch's order, by names that all processes of the machine give them."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in named.split(",")] if named else [str(index) for index in range(count)]
    return tuple(names[:count])


def least_used(visible: Sequence[str], taken: Collection[str]) -> int:
    """The place of the GPU for one more worker. Args: visible: to it. taken: by others of its machine, each time.

    At equal use the first, so that a worker that takes the place of another one has its GPU.
    """
    uses = [sum(other == name for other in taken) for name in visible]
    return uses.index(min(uses))


def use_gpu(who: str, index: int) -> torch.device:
    """Make a GPU this process's own one. Raises: WorkerError when it is not there."""
    device = torch.device("cuda", index)
    _start(index)
    take_gpu(who, device)
    return device


def _start(index: int) -> None:
    """Start CUDA's driver and make its context on a GPU, which can take seconds where many do it at once.

    PyTorch would do it on its first call, and let no other thread run meanwhile: whoever listens for this process's
    beats would take it for stopped. What fails here PyTorch says better.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), index) == 0:
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
