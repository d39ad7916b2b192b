"""Update only the rows of an embedding that a batch touched.

The gradient of an embedding is zero but for the rows that were looked up. Where its only use is `p ± scale * gradient`
(plain SGD), the dense gradient is never made: the rows' gradients are added straight into the table, at a cost that
does not depend on the table's size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from millrace.graph.graph import Graph, copy_fx, set_output, step_module

aten = torch.ops.aten


def sparse_rows(graph: Graph) -> Graph:
    """Rewrite every such update; the graph itself when there is none."""
    candidates = {variable: name for variable, name in graph.updates.items() if _match(graph.node(name)) is not None}
    if not candidates:
        return graph
    fx, mapping = copy_fx(graph.module)
    by_name = {old.name: new for old, new in mapping.items()}
    replaced: dict[str, Node] = {}
    for variable, name in candidates.items():
        update = by_name[name]
        match = _match(update)
        assert match is not None
        replaced[variable] = _rewrite(fx, update, *match)
    updates = {v: replaced.get(v, by_name[name]) for v, name in graph.updates.items()}
    set_output(fx, [*(by_name[name] for name in graph.fetches.values()), *updates.values()])
    fx.eliminate_dead_code()
    return graph.with_(module=step_module(graph.module, fx), updates={v: node.name for v, node in updates.items()})


def _match(update: Node) -> tuple[Node, Node | float, float] | None:
    """(dense gradient, scale, sign) of an update `p + sign * (gradient * scale)`; None for any other."""
    if not isinstance(update.args[0], Node) or update.args[0].op != "placeholder":
        return None
    arguments: tuple[Any, ...] = update.args
    if update.target is aten.addcmul.default and not update.kwargs:
        factors, sign = arguments[1:], 1.0
    elif update.target in (aten.add.Tensor, aten.sub.Tensor):
        change: Any = arguments[1]
        sign = 1.0 if update.target is aten.add.Tensor else -1.0
        factors = (change, update.kwargs.get("alpha", 1.0))
        scaled = isinstance(change, Node) and change.target is aten.mul.Tensor and len(change.users) == 1
        if scaled and not update.kwargs:
            factors = change.args
    else:
        return None
    gradient, scale = factors if _is_dense_gradient(factors[0]) else reversed(factors)
    if not _is_dense_gradient(gradient) or not _is_scalar(scale):
        return None
    assert isinstance(gradient, Node)
    # A clipped, logged or fetched gradient is needed whole; so is one that counts how often a row occurs.
    if len(gradient.users) != 1 or gradient.args[4]:
        return None
    return gradient, scale, sign


def _is_dense_gradient(node: Any) -> bool:
    return isinstance(node, Node) and node.target is aten.embedding_dense_backward.default


def _is_scalar(scale: Any) -> bool:
    return isinstance(scale, int | float) or (
        isinstance(scale, Node) and isinstance(scale.meta.get("val"), Tensor) and scale.meta["val"].ndim == 0
    )


def _rewrite(fx: torch.fx.Graph, update: Node, gradient: Node, scale: Node | float, sign: float) -> Node:
    outer, indices, _, padding, _ = gradient.args
    table: Any = update.args[0]
    width = table.meta["val"].shape[-1]

    def call(target: Any, *args: Any) -> Node:
        node = fx.call_function(target, args)
        fakes = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
        with _fake_mode(table):
            node.meta = {**update.meta, "val": target(*fakes)}
        return node

    with fx.inserting_before(update):
        rows = call(aten.reshape.default, indices, [-1])
        values = call(aten.reshape.default, outer, [-1, width])
        if isinstance(padding, int) and padding >= 0:
            real = call(aten.unsqueeze.default, call(aten.ne.Scalar, rows, padding), -1)
            values = call(aten.mul.Tensor, values, real)
        values = call(aten.mul.Tensor, values, scale)
        values = call(aten.neg.default, values) if sign < 0 else values
        return call(aten.index_put.default, table, [rows], values, True)


def _fake_mode(node: Node) -> Any:
    value = node.meta["val"]
    assert isinstance(value, FakeTensor)
    return value.fake_mode
