"""Operators by name, for files: a name can only ever mean an operator that is registered with PyTorch."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
import torch._higher_order_ops  # registers cond, scan, map and their kin
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

import millrace.graph.checked_index
import millrace.graph.random  # noqa: F401  registers millrace.uniform
from millrace.errors import GraphError

GETITEM = "getitem"
_HIGHER_ORDER = "higher_order"
_OVERLOAD = re.compile(r"(\w+)\.(\w+)\.(\w+)", re.ASCII)
_CONTROL_FLOW = re.compile(rf"{_HIGHER_ORDER}\.(\w+)", re.ASCII)

Operator = OpOverload | HigherOrderOperator


def operator_name(target: Any) -> str:
    """The name that `find_operator` turns back into `target`: "aten.add.Tensor", "higher_order.cond", "getitem".

    Raises: GraphError when there is no such name.
    """
    if target is operator.getitem:
        return GETITEM
    if isinstance(target, OpOverload):
        name = str(target)
    elif isinstance(target, HigherOrderOperator):
        name = f"{_HIGHER_ORDER}.{target.name()}"
    else:
        raise GraphError(f"{target!r} is no registered operator; expected an ATen, custom or control-flow operator")
    if _registered(name) is not target:
        raise GraphError(f"the operator {name!r} cannot be found under its own name in torch.ops")
    return name


def find_operator(name: str) -> Any:
    """The operator of that name.

    Names are looked up among the registered operators and nowhere else, so that a file cannot name other code.

    Raises: GraphError when no operator of that name is registered in this process.
    """
    found = operator.getitem if name == GETITEM else _registered(name)
    if found is None:
        raise GraphError(
            f"the operator {name!r} is not registered in this process (torch {torch.__version__}). "
            "If it is a custom operator: register it (import the module that defines it) before loading."
        )
    return found


def _registered(name: str) -> Operator | None:
    """What torch.ops holds under a name; every step on the way there must be what it should be."""
    if match := _CONTROL_FLOW.fullmatch(name):
        found = getattr(torch.ops.higher_order, match[1], None)
        return found if isinstance(found, HigherOrderOperator) else None
    if match := _OVERLOAD.fullmatch(name):
        packet = getattr(getattr(torch.ops, match[1], None), match[2], None)
        found = getattr(packet, match[3], None) if isinstance(packet, OpOverloadPacket) else None
        return found if isinstance(found, OpOverload) else None
    return None
