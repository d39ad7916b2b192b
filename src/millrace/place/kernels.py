"""For which kinds of device an operator of the user's own has a kernel."""

from __future__ import annotations

import torch
from torch._ops import OpOverload
from torch.fx import Node

_BACKENDS = {"cpu": "CPU", "cuda": "CUDA"}
KINDS = tuple(_BACKENDS)


def has_kernel(node: Node, kind: str) -> bool:
    """Whether a user's operator can run on a kind of device."""
    assert isinstance(node.target, OpOverload)
    overload = node.target._overloadname
    name = node.target._schema.name + ("" if overload == "default" else f".{overload}")
    keys = (_BACKENDS.get(kind, "CPU"), "CompositeExplicitAutograd", "CompositeImplicitAutograd")
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys)


def kinds_with_kernel(node: Node) -> list[str]:
    """The kinds of device on which a user's operator can run."""
    return [kind for kind in KINDS if has_kernel(node, kind)]


def is_users_own(node: Node) -> bool:
    """Whether an operator is neither PyTorch's nor ours."""
    return isinstance(node.target, OpOverload) and node.target.namespace not in ("aten", "prims", "prim", "millrace")
