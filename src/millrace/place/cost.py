"""How long nodes take on a device: their work, from shapes, over the rates that were measured there.

A node that multiplies takes its operations over the device's rate for them, or the time that its bytes take, whichever
is longer; all others take the time of the bytes that they read and write (of a table, the rows looked up). Each also
costs a start. A compiler fuses elementwise operators: then only what goes in and out of a group of them that depend on
each other counts, and one start.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from millrace.graph.flops import node_flops
from millrace.graph.graph import info
from millrace.graph.signature import Phase
from millrace.place.cluster import ATTENTION, CONVOLUTION, MEMORY, PRODUCT, SPECIAL, Device

aten = torch.ops.aten


@dataclass(frozen=True)
class Work:
    """What a node, or some fused ones, ask of a device. dtype: in which precision ("float32")."""

    operators: str
    flops: float
    moved_bytes: float
    dtype: str

    def seconds(self, device: Device) -> float:
        """How long it takes there."""
        moving = self.operators if self.operators == SPECIAL else MEMORY
        moving_s = self.moved_bytes / device.rate(moving, self.dtype)
        computing_s = self.flops / device.rate(self.operators, self.dtype) if self.flops else 0.0
        return device.dispatch_s + max(moving_s, computing_s)


def works_of(nodes: Sequence[Node], *, fused: bool) -> list[Work]:
    """The work of nodes that run together.

    Args: fused: whether a compiler puts neighbouring elementwise operators together.
    """
    computing = [node for node in nodes if not is_free(node)]
    if not fused:
        return [_work([node]) for node in computing]
    leader: dict[Node, Node] = {}

    def root(node: Node) -> Node:
        while leader[node] is not node:
            node = leader[node]
        return node

    for node in computing:
        leader[node] = node
        if not _is_fusible(node):
            continue
        for source in _real_inputs(node):
            if source in leader and _is_fusible(source):
                leader[root(source)] = node
    groups: dict[Node, list[Node]] = {}
    for node in computing:
        groups.setdefault(root(node), []).append(node)
    return [_work(group) for group in groups.values()]


def is_free(node: Node) -> bool:
    """Whether a node computes nothing: a view, or the choice of one of several results."""
    if node.op != "call_function" or node.target is operator.getitem:
        return True
    return isinstance(node.target, OpOverload) and node.target.is_view


def tensor_bytes(value: object) -> float:
    """Bytes of a tensor or of several."""
    return float(sum(t.numel() * t.element_size() for t in pytree.tree_leaves(value) if isinstance(t, Tensor)))


def _work(nodes: Sequence[Node]) -> Work:
    own = set(nodes)
    read = {source: None for node in nodes for source in _real_inputs(node) if source not in own}
    written = [node for node in nodes if len(nodes) == 1 or any(user not in own for user in _real_users(node))]
    values = [node.meta.get("val") for node in (*read, *written)]
    if len(nodes) == 1 and _touches_rows(nodes[0]):
        table, result = nodes[0].args[0], nodes[0].meta.get("val")
        rows = result if nodes[0].target in _LOOKUPS else nodes[0].args[2].meta.get("val")  # type: ignore[union-attr]
        values = [rows, rows, *(source.meta.get("val") for source in nodes[0].all_input_nodes if source is not table)]
    flops, kind = max((_flops(node), _class(node)) for node in nodes)
    if not flops:
        kind = SPECIAL if any(_is_special(node) for node in nodes) else MEMORY
    return Work(kind, flops, tensor_bytes(values), _precision(nodes[-1]))


def _touches_rows(node: Node) -> bool:
    """Whether only some rows of a table are read, or changed where it lies: a variable that is updated."""
    changed = node.target in _ROW_CHANGES and info(node).phase is Phase.UPDATE
    return node.target in _LOOKUPS or (changed and node.all_input_nodes[0].op == "placeholder")


_LOOKUPS = (aten.embedding.default, aten.index_select.default, aten.gather.default, aten.index.Tensor)
_ROW_CHANGES = (aten.index_put.default,)


def _is_special(node: Node) -> bool:
    """Whether the processor computes longer at an element than memory takes to bring it."""
    name = str(node.target)
    return any(word in name for word in _SPECIAL)


# Roots and quotients are not among them: processors do several at once about as fast as memory brings them.
_SPECIAL = ("gelu", "softmax", "tanh", "exp.", "log.", "sigmoid", "silu", "pow", "erf", "uniform")


def _flops(node: Node) -> float:
    flops = node_flops(node)
    return flops if math.isfinite(flops) else 0.0


def _class(node: Node) -> str:
    name = str(node.target)
    if "convolution" in name:
        return CONVOLUTION
    return ATTENTION if "attention" in name else PRODUCT


def _is_fusible(node: Node) -> bool:
    """Whether the compiler makes it part of what is beside it: a few operations per element, no lookup."""
    if not isinstance(node.target, OpOverload) or node_flops(node):
        return False
    return torch.Tag.pointwise in node.target.tags or node.target.overloadpacket in _FUSED_TOO


_FUSED_TOO = {aten.sum, aten.mean, aten.amax, aten.native_layer_norm, aten._softmax, aten._log_softmax, aten.clone}


def _real_inputs(node: Node) -> Iterable[Node]:
    """What a node reads, seen through what is free."""
    for source in node.all_input_nodes:
        if source.op == "call_function" and is_free(source):
            yield from _real_inputs(source)
        else:
            yield source


def _real_users(node: Node) -> Iterable[Node]:
    for user in node.users:
        if user.op == "call_function" and is_free(user):
            yield from _real_users(user)
        else:
            yield user


def _precision(node: Node) -> str:
    floats = [
        t.dtype
        for t in pytree.tree_leaves([n.meta.get("val") for n in (*node.all_input_nodes, node)])
        if isinstance(t, Tensor) and t.is_floating_point() and t.ndim
    ]
    return str(min(floats, key=lambda d: d.itemsize)).removeprefix("torch.") if floats else "float32"
