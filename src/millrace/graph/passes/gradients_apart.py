"""The gradients of a convolution as two nodes: that of its input, for which others wait, and those of its variables.

PyTorch has one operator for all three; inside it works them out one after the other. As two nodes they can run at
different times, and on a divided graph the second fills time in which a device would wait.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from millrace.graph.graph import Graph, copy_fx, step_module

aten = torch.ops.aten


def gradients_apart(graph: Graph) -> Graph:
    """The same step with every `convolution_backward` that makes both kinds of gradients divided."""
    if not any(_makes_both(node) for node in graph.nodes):
        return graph
    fx, _ = copy_fx(graph.module)
    for node in list(fx.nodes):
        if _makes_both(node):
            _divide(fx, node)
    return graph.with_(module=step_module(graph.module, fx))


def _makes_both(node: Node) -> bool:
    if node.target is not aten.convolution_backward.default:
        return False
    mask = node.args[-1]
    assert isinstance(mask, list | tuple)
    return bool(mask[0]) and any(mask[1:])


def _divide(fx: torch.fx.Graph, node: Node) -> None:
    mask = node.args[-1]
    picks = list(node.users)
    assert isinstance(mask, list | tuple)
    assert all(pick.target is operator.getitem for pick in picks)
    with fx.inserting_before(node):
        second = fx.call_function(node.target, (*node.args[:-1], [False, *mask[1:]]), node.kwargs)  # type: ignore[arg-type]
    second.meta = {**node.meta, "val": (None, *node.meta["val"][1:])}
    node.args = (*node.args[:-1], [True, False, False])
    node.meta = {**node.meta, "val": (node.meta["val"][0], None, None)}
    for pick in picks:
        if pick.args[1] != 0:
            pick.args = (second, pick.args[1])
