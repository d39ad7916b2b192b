"""The same graph on another device: constants go there, and what names a device names that one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from millrace.graph.encoding import attribute
from millrace.graph.graph import Graph, copy_fx, step_module
from millrace.graph.passes.portable_attention import portable_attention

aten = torch.ops.aten
_RESHAPED = {aten.view.default, aten._unsafe_view.default}


def to_device(graph: Graph, device: torch.device) -> Graph:
    """The graph with all its tensors on `device`, wherever it was traced.

    It has no `initial` values and no `retrace`, which belong to the device of the trace. On a device of another kind
    its results are the same up to rounding, as the kernels are others.
    """
    spec, portable = str(device), portable_attention(graph)
    return portable.with_(
        module=_moved(portable.module, device),
        variables=tuple(replace(v, spec=replace(v.spec, device=spec)) for v in graph.variables),
        feeds=tuple(replace(f, spec=replace(f.spec, device=spec)) for f in graph.feeds),
        initial={},
        retrace=None,
    )


def _moved(module: GraphModule, device: torch.device) -> GraphModule:
    fx, _ = copy_fx(module)
    held: dict[str, Any] = {}
    for node in fx.nodes:
        if node.op == "get_attr":
            value = attribute(module, str(node.target))
            held[str(node.target)] = _moved(value, device) if isinstance(value, GraphModule) else value.to(device)
        elif node.op == "call_function":
            _retarget(node, device)
        if "val" in node.meta:
            node.meta["val"] = torch.utils._pytree.tree_map_only(Tensor, lambda t: _fake(t, device), node.meta["val"])
    return step_module(held, fx)


def _retarget(node: Node, device: torch.device) -> None:
    named = [argument for argument in node.kwargs.values() if isinstance(argument, torch.device)]
    there = lambda a: device if isinstance(a, torch.device) else a  # noqa: E731
    node.args = torch.fx.node.map_aggregate(node.args, there)
    node.kwargs = torch.fx.node.map_aggregate(node.kwargs, there)
    if not isinstance(node.target, OpOverload):
        return
    takes_device = any(argument.name == "device" for argument in node.target._schema.arguments)
    if takes_device and not named and not node.all_input_nodes:  # it would be made on the CPU
        node.kwargs = {**node.kwargs, "device": device}
    if node.target in _RESHAPED:
        # Kernels of two kinds of devices may lay out a result differently; then it has to be copied.
        node.target = aten.reshape.default


def _fake(tensor: Tensor, device: torch.device) -> Tensor:
    if not isinstance(tensor, FakeTensor) or tensor.layout is not torch.strided:
        return tensor
    with tensor.fake_mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
