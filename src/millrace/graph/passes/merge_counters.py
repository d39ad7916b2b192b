"""One step counter where an optimizer keeps an equal one for every parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from millrace.graph.signature import Role, Variable

aten = torch.ops.aten


def merge_counters(
    variables: Sequence[Variable],
    inputs: Mapping[str, Node],
    updates: dict[str, Node],
    initial: Mapping[str, Tensor],
) -> set[str]:
    """Let the readers of equal counters read the first of them; return the names of the others.

    `torch.optim` counts the steps of every parameter apart, and the bias corrections are computed once for each. Two
    counters are equal for ever when they start equal and both grow by the same constant. Changes the nodes and takes
    the merged names out of `updates`.
    """
    first: dict[tuple[object, ...], str] = {}
    merged: set[str] = set()
    for variable in variables:
        if variable.role is not Role.OPTIMIZER or variable.spec.shape or variable.name not in updates:
            continue
        growth = _growth(inputs[variable.name], updates[variable.name])
        if growth is None or initial[variable.name].is_meta:  # a tensor without a value, traced to look at
            continue
        prefix = variable.name.split("/")[0]
        key = (prefix, variable.spec.dtype, growth, float(initial[variable.name]))
        kept = first.setdefault(key, variable.name)
        if kept != variable.name:
            inputs[variable.name].replace_all_uses_with(inputs[kept])
            updates.pop(variable.name)
            merged.add(variable.name)
    return merged


def _growth(placeholder: Node, update: Node) -> float | None:
    """The constant that the update adds; None when it does anything else."""
    if update.target is aten.add.Tensor and update.args[0] is placeholder and isinstance(update.args[1], int | float):
        return None if update.kwargs else float(update.args[1])
    return None
