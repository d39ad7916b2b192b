"""Loops and branches inside the graph: `scan`, `map_` and `cond`.

They mean the same inside a traced step, where each becomes one node with its body as a subgraph, and outside of it,
where they run as the Python loop or `if` that they stand for. Bodies may use modules and any other tensors around them;
gradients reach those, too (`closures.py`). torch.cond and torch's own scan and map work inside a step as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._higher_order_ops.cond import cond_op
from torch._higher_order_ops.map import map_impl
from torch._higher_order_ops.scan import scan_op

from millrace.errors import TraceError
from millrace.graph.signature import TensorSpec


def scan(combine: Callable[..., tuple[Any, Any]], init: Any, xs: Any, *constants: Any) -> tuple[Any, Any]:
    """Carry a value along the first axis of `xs`: the loop of a recurrent network, as one node.

    Args:
        combine: `combine(carry, x, *constants) -> (carry, y)`. The carry keeps its structure, shapes and dtypes.
        init: the carry at the start, a tensor or a nest of tensors.
        xs: a tensor or a nest of tensors, each [length, ...]; `x` is one row of each.
        constants: handed to every call. Tensors that `combine` merely closes over work as well.

    Returns: (the last carry, the ys stacked to [length, ...]).

    Raises: TraceError when lengths differ, or the carry changes its structure, a shape or a dtype.
    """
    leaves, x_nest = pytree.tree_flatten(xs)
    length = _length("scan", leaves)
    start, carry_nest = pytree.tree_flatten(init)
    fixed, fixed_nest = pytree.tree_flatten(constants)

    def body(*flat: Tensor) -> tuple[Any, Any]:
        carry = pytree.tree_unflatten(list(flat[: len(start)]), carry_nest)
        x = pytree.tree_unflatten(list(flat[len(start) : len(start) + len(leaves)]), x_nest)
        carry, y = combine(carry, x, *pytree.tree_unflatten(list(flat[len(start) + len(leaves) :]), fixed_nest))
        _check_carry(carry, start, carry_nest)
        return carry, y

    if torch.compiler.is_compiling():
        found: tuple[Any, Any] = scan_op(body, start, leaves, tuple(fixed))
        return found
    carry, ys = init, []
    for row in range(length):
        carry, y = body(*pytree.tree_leaves(carry), *(leaf[row] for leaf in leaves), *fixed)
        ys.append(y)
    return carry, _stacked(ys)


def map_(function: Callable[..., Any], xs: Any, *constants: Any) -> Any:
    """Apply `function(x, *constants)` to every row of `xs` and stack what it returns; as one node.

    Args:
        function: takes one row of each tensor in `xs`; returns a tensor or a nest of tensors.
        xs: a tensor or a nest of tensors, each [length, ...].
        constants: handed to every call. Tensors that `function` merely closes over work as well.

    Returns: what `function` returns, each tensor stacked to [length, ...].

    Raises: TraceError when lengths differ.
    """
    leaves, x_nest = pytree.tree_flatten(xs)
    length = _length("map_", leaves)
    fixed, fixed_nest = pytree.tree_flatten(constants)

    def body(*flat: Tensor) -> Any:
        x = pytree.tree_unflatten(list(flat[: len(leaves)]), x_nest)
        return function(x, *pytree.tree_unflatten(list(flat[len(leaves) :]), fixed_nest))

    if torch.compiler.is_compiling():
        return map_impl(body, leaves, fixed)
    return _stacked([body(*(leaf[row] for leaf in leaves), *fixed) for row in range(length)])


def cond(
    predicate: Tensor | bool, yes: Callable[..., Any], no: Callable[..., Any], operands: Sequence[Any] = ()
) -> Any:
    """`yes(*operands)` if the predicate holds, else `no(*operands)`; both stand in the graph, one of them runs.

    Args:
        predicate: a bool, or a boolean tensor of one element.
        yes, no: must return the same structure, shapes and dtypes.
        operands: handed to the branch. Tensors that the branches merely close over work as well.
    """
    if isinstance(predicate, Tensor) and torch.compiler.is_compiling():
        return cond_op(predicate, yes, no, tuple(operands))
    return yes(*operands) if predicate else no(*operands)


def _length(name: str, leaves: Sequence[Any]) -> int:
    lengths = {tuple(leaf.shape)[:1] if isinstance(leaf, Tensor) else None for leaf in leaves}
    if len(lengths) != 1 or lengths <= {(), (0,), None}:
        got = [list(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves]
        raise TraceError(
            f"{name} goes along the first axis of every tensor in `xs`, which must be at least 1 long and the same "
            f"for all of them; got {got}."
        )
    return int(lengths.pop()[0])  # type: ignore[index]


def _check_carry(carry: Any, start: Sequence[Tensor], nest: Any) -> None:
    leaves, found = pytree.tree_flatten(carry)
    if found != nest:
        raise TraceError(f"scan: the carry starts as {nest}, but the body returns {found}. It must keep its structure.")
    for before, after in zip(start, leaves, strict=True):
        old, new = TensorSpec.of(before), TensorSpec.of(after)
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise TraceError(
                f"scan: the carry starts as {old}, but the body returns {new}. It must keep its shape and dtype."
            )


def _stacked(rows: Sequence[Any]) -> Any:
    nest = pytree.tree_structure(rows[0])
    columns = zip(*(pytree.tree_leaves(row) for row in rows), strict=True)
    return pytree.tree_unflatten([torch.stack(column) for column in columns], nest)
