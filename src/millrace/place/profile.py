"""How long single nodes take, measured where they are to run.

Rates by class of operators hold for shapes like those that they were measured with. For devices that are there, every
kind of node (operator, layouts of its tensors, other arguments) can be measured itself, on tensors of noise: it takes
about as long as a few steps. What a compiler puts together is not measured, and keeps to the rates.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from millrace.graph.graph import Graph
from millrace.place.cluster import Device
from millrace.place.cost import Work, works_of

_RUNS, _LONG_S = 5, 0.02  # of each kind of node; a long one is run twice

Seconds = Mapping[str, float]  # by kind of node


@dataclass(frozen=True)
class Profile:
    """What was measured. alone, busy: of each device, while the others of its host rest, and while they work."""

    alone: Mapping[str, Seconds] = field(default_factory=dict)
    busy: Mapping[str, Seconds] = field(default_factory=dict)
    _kinds: dict[Node, str] = field(default_factory=dict)

    def seconds(self, work: Work, device: Device, *, among_others: bool) -> float:
        """How long work takes on a device: as measured, or else by its rates."""
        found = (self.busy if among_others else self.alone).get(device.name)
        if found and work.node is not None:
            kind = self._kinds.get(work.node) or self._kinds.setdefault(work.node, kind_of(work.node))
            if kind in found:
                return found[kind]
        return work.seconds(device.among_others() if among_others else device)


def kinds_of(graph: Graph, *, fused: bool) -> dict[str, Node]:
    """One node of every kind that runs by itself, the heaviest first. Args: fused: see `cost.works_of`."""
    works = [work for work in works_of(graph.nodes, fused=fused) if work.node is not None]
    works.sort(key=lambda work: -(work.flops + 10.0 * work.moved_bytes))
    found: dict[str, Node] = {}
    for work in works:
        assert work.node is not None
        found.setdefault(kind_of(work.node), work.node)
    return found


def kind_of(node: Node) -> str:
    """What decides how long a node takes, as text."""
    return f"{node.target}{map_arg((node.args, node.kwargs), lambda n: _layout(n.meta.get('val')))}"


def measure(kinds: Mapping[str, Node], budget_s: float) -> dict[str, float]:
    """Seconds of each kind of node in this process; kinds that do not run on noise, or in the time, are left out."""
    found = {}
    end_s = time.monotonic() + budget_s
    with torch.no_grad():
        for kind, node in kinds.items():
            if time.monotonic() > end_s:
                break
            try:
                found[kind] = _median_s(node)
            except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError):
                continue  # foreign kernels may refuse noise in any way; rates will do for them
    return found


def _median_s(node: Node) -> float:
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: pytree.tree_map(_noise, n.meta["val"]))
    assert callable(node.target)
    taken_s: list[float] = []
    for _ in range(1 + _RUNS):
        begin_s = time.perf_counter()
        node.target(*args, **kwargs)
        taken_s.append(time.perf_counter() - begin_s)
        if len(taken_s) > 2 and taken_s[-1] > _LONG_S:
            break
    return statistics.median(taken_s[1:])  # the first run takes memory and chooses kernels


def _noise(value: Any) -> Any:
    """A tensor laid out as a fake one: normal noise, or zeros where numbers may be indices."""
    if not isinstance(value, Tensor):
        return value
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    extent = max(extent, 0) if value.numel() else 0
    memory = torch.zeros(extent, dtype=value.dtype)
    if value.is_floating_point():
        memory.normal_()
    return memory.as_strided(value.shape, value.stride())


def _layout(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return "?" if value is None else pytree.tree_map(_layout, value) if isinstance(value, tuple | list) else value
    return f"{value.dtype}{list(value.shape)}{value.stride()}"
