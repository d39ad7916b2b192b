"""What goes into a graph and what comes out: variables, feeds, fetches, updates."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

BESIDE = "outer/"  # begins the names of variables that a step does not use; a checkpoint need not have them


class Role(enum.StrEnum):
    """What a variable is for; placement, checkpoints and printing treat the roles apart."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    OPTIMIZER = "optimizer"
    STEP = "step"
    RANDOM = "random"
    TENSOR = "tensor"  # a tensor that the user named by hand


class Phase(enum.StrEnum):
    """The part of a training step that a node belongs to."""

    FORWARD = "forward"
    BACKWARD = "backward"
    UPDATE = "update"


@dataclass(frozen=True)
class TensorSpec:
    """Shape, dtype and device of a tensor that need not exist yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str = "cpu"

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        return cls(tuple(int(n) for n in tensor.shape), tensor.dtype, str(tensor.device))

    @property
    def size_bytes(self) -> int:
        """Bytes that a contiguous tensor of this kind takes."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count * self.dtype.itemsize

    def fits(self, tensor: Tensor) -> bool:
        """Whether `tensor` has this shape and dtype (the device is the session's business)."""
        return tuple(tensor.shape) == self.shape and tensor.dtype == self.dtype

    def __str__(self) -> str:
        return f"{short_dtype(self.dtype)}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Part:
    """Where a variable that is a block of a larger one lies in it: `start` to `stop` along `dim`."""

    whole: str  # the larger variable's name
    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class Variable:
    """One named tensor that lives from step to step.

    `owner` is the parameter that an optimizer's slot belongs to ("fc.weight" for
    "optimizer/fc.weight/exp_avg"), otherwise the variable's own name. `part`: of which larger variable it is a block,
    after `passes.splitting`.
    """

    name: str
    spec: TensorSpec
    role: Role
    owner: str
    part: Part | None = None


@dataclass(frozen=True)
class Feed:
    """One named tensor of the batch, e.g. "images" of a dict or "0" of a tuple."""

    name: str
    spec: TensorSpec


def short_dtype(dtype: torch.dtype) -> str:
    """`f32` for `torch.float32`, as compilers write it."""
    name = str(dtype).removeprefix("torch.")
    for long, short in (("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "i"), ("complex", "c")):
        if name.startswith(long):
            return short + name.removeprefix(long)
    return name
