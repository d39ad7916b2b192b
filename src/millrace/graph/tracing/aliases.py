"""Which nodes share memory with which."""

from __future__ import annotations

import operator

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, GraphModule, Node


def is_view(node: Node) -> bool:
    """Whether a node's result shares memory with its first argument."""
    if node.target is operator.getitem:
        parent = node.args[0]
        return isinstance(parent, Node) and is_view(parent)  # split and unbind return views
    target = node.target
    return isinstance(target, OpOverload) and (
        target.is_view or any(result.alias_info is not None for result in target._schema.returns)
    )


def base_of(node: Node) -> Node:
    """The node whose memory a node's result is a view of; itself when its memory is its own."""
    while is_view(node) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def give_bodies_own_memory(module: GraphModule) -> None:
    """Let no loop or branch be given the same memory twice, and no body return an input or the same memory twice; in
    place: functionalization refuses such ones.

    torch makes them for the backward pass of scan: the gradients of a carry may be views of one tensor.
    """
    for child in module.children():
        if isinstance(child, GraphModule):
            give_bodies_own_memory(child)
            output = next(iter(child.graph.find_nodes(op="output")))
            inputs = {node for node in child.graph.nodes if node.op in ("placeholder", "get_attr")}
            _copy_repeated(child.graph, output, inputs)
            child.recompile()
    for node in list(module.graph.nodes):
        if isinstance(node.target, HigherOrderOperator):
            _copy_repeated(module.graph, node, set())
    module.recompile()


def _copy_repeated(graph: Graph, user: Node, seen: set[Node]) -> None:
    """Give `user` copies of those of its arguments whose memory is in `seen` or is that of an earlier argument."""

    def own(node: Node) -> Node:
        base = base_of(node)
        if "val" in node.meta and not isinstance(node.meta["val"], Tensor):
            return node
        if node.op == "get_attr" and "val" not in node.meta and user.op != "output":
            return node  # a body
        if base in seen:
            copied = graph.call_function(torch.ops.aten.clone.default, (node,))
            copied.meta = dict(node.meta)
            return copied
        seen.add(base)
        return node

    with graph.inserting_before(user):
        user.args = pytree.tree_map_only(Node, own, user.args)
