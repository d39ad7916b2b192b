"""How many bytes the values of a graph take, and how to write such numbers."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from millrace.graph.signature import TensorSpec


def value_bytes(value: Any) -> int:
    """Bytes of a tensor's elements, or of all tensors in a tuple or list; 0 for anything else."""
    if isinstance(value, Tensor):
        return TensorSpec.of(value).size_bytes
    return sum(value_bytes(part) for part in value) if isinstance(value, tuple | list) else 0


def new_bytes(node: Node) -> int:
    """Bytes of memory that running the node adds: nothing for a view or for one part of a tuple."""
    target = node.target
    if target is operator.getitem or (isinstance(target, OpOverload) and target.is_view):
        return 0
    return value_bytes(node.meta.get("val"))


def human_bytes(count: int) -> str:
    """`1.5 KiB` for 1536: three significant digits, in powers of 1024."""
    if count < 1024:
        return f"{count} B"
    size, units = float(count), iter(("KiB", "MiB", "GiB", "TiB"))
    for unit in units:
        size /= 1024
        if size < 1000 or unit == "TiB":
            break
    digits = 2 if size < 9.995 else 1 if size < 99.95 else 0
    number = f"{size:.{digits}f}"
    return f"{number.rstrip('0').rstrip('.') if digits else number} {unit}"
