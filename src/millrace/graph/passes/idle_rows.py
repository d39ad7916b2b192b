"""Whether an update leaves rows without a gradient alone, so that it may be made of the others only.

Plain SGD and Adagrad do. Momentum goes on moving such rows, moments decay, and weight decay shrinks them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from millrace.graph.graph import Graph, feed_key, info

aten = torch.ops.aten

_ZERO = 0  # of a node: the row is zero. A string: it is the row of this variable. None: something else.
_Row = int | str | None


def why_not_idle(update: Graph, table: str) -> str:
    """Why a row of a table whose gradient is zero does not stay as it is, or its slots; "" where they do.

    Args: update: as `halves` or `shards` makes it; "gradient/<table>" is among its feeds.
    """
    inputs = update.placeholders()
    owned = [v for v in update.variables if v.owner == table and v.spec.shape == update.variable(table).spec.shape]
    rows: dict[Node, _Row] = {inputs[variable.name]: variable.name for variable in owned}
    rows[inputs[feed_key(f"gradient/{table}")]] = _ZERO
    for node in update.fx.nodes:
        if node.op == "call_function" and not rows.keys().isdisjoint(node.all_input_nodes):
            rows[node] = _row(node, rows)
    for variable in owned:
        name = update.updates.get(variable.name)
        if name is not None and rows.get(update.node(name)) != variable.name:
            line = info(update.node(name)).line
            where = f" ({line})" if line else ""
            what = "it" if variable.name == table else f"its slot {variable.name!r}"
            return f"the optimizer changes {what} also in rows whose gradient is zero{where}"
    return ""


def _row(node: Node, rows: dict[Node, _Row]) -> _Row:
    rule = _RULES.get(node.target)
    values = [rows.get(a) if isinstance(a, Node) else None for a in node.args]
    return rule(values, node) if rule is not None else None


def _sum(values: list[_Row], node: Node) -> _Row:
    first, second = values
    if second == _ZERO:
        return first
    plain = node.target is aten.add.Tensor and node.kwargs.get("alpha", 1) == 1
    return second if first == _ZERO and plain else None


def _product(values: list[_Row], node: Node) -> _Row:
    return _ZERO if _ZERO in values else None


def _quotient(values: list[_Row], node: Node) -> _Row:
    return _ZERO if values[0] == _ZERO else None


def _sum_of_product(values: list[_Row], node: Node) -> _Row:
    return values[0] if _ZERO in values[1:] else None


def _sum_of_quotient(values: list[_Row], node: Node) -> _Row:
    return values[0] if values[1] == _ZERO else None


def _odd(values: list[_Row], node: Node) -> _Row:
    return _ZERO if values[0] == _ZERO else None


def _power(values: list[_Row], node: Node) -> _Row:
    exponent = node.args[1]
    return _ZERO if values[0] == _ZERO and isinstance(exponent, int | float) and exponent > 0 else None


def _clamped(values: list[_Row], node: Node) -> _Row:
    low, high = [*node.args[1:], None, None][:2]
    around = (low is None or _number(low) <= 0) and (high is None or _number(high) >= 0)
    return _ZERO if values[0] == _ZERO and around else None


def _number(bound: Any) -> float:
    return float(bound) if isinstance(bound, int | float) else float("nan")


def _same(values: list[_Row], node: Node) -> _Row:
    source = node.all_input_nodes[0]
    return values[0] if values[0] == _ZERO or node.meta["val"].dtype == source.meta["val"].dtype else None


_RULES: dict[Any, Callable[[list[_Row], Node], _Row]] = {
    aten.add.Tensor: _sum,
    aten.sub.Tensor: _sum,
    aten.mul.Tensor: _product,
    aten.mul.Scalar: _product,
    aten.div.Tensor: _quotient,
    aten.div.Scalar: _quotient,
    aten.addcmul.default: _sum_of_product,
    aten.addcdiv.default: _sum_of_quotient,
    aten.neg.default: _odd,
    aten.abs.default: _odd,
    aten.sign.default: _odd,
    aten.sqrt.default: _odd,
    aten.square.default: _odd,
    aten.pow.Tensor_Scalar: _power,
    aten.clamp.default: _clamped,
    aten._to_copy.default: _same,
    aten.clone.default: _same,
    aten.alias.default: _same,
}
