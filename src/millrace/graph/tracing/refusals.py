"""What no graph can hold: values read by Python, sizes that depend on values, hidden generators, and outsiders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from millrace.errors import TraceError
from millrace.graph.tracing.user_code import user_line

aten = torch.ops.aten

_HIDDEN_READS = {
    aten._local_scalar_dense.default: "reads a tensor's value into Python (`.item()`, `float(t)`, `if t:`)",
    aten.nonzero.default: "makes a tensor whose size depends on values (`nonzero`, `x[mask]`, `where(mask)`)",
    aten.masked_select.default: "makes a tensor whose size depends on values (`masked_select`)",
    aten._unique2.default: "makes a tensor whose size depends on values (`unique`)",
}
_UNKNOWN_SIZE = "makes a tensor whose size depends on values (`x[mask]`)"
WHILE_WITH_GRADIENT = (
    "a loop whose length is known only at run time has no gradient here.\n"
    "  Ways out: millrace.graph.scan over a fixed number of steps with a mask for those beyond the end, a Python `for` "
    "over a fixed range, or torch.no_grad() around it when no gradient is wanted."
)
PRINTED = (
    "the step formats a tensor's value or hands it to NumPy, and a graph is made before values exist.\n"
    "  Ways out: return the tensor from the step and print it after `run`, or look at it with `Session.watching`; "
    "compute with torch's own operators; or register what you do as an operator, see docs/custom-ops.md."
)
WAYS_OUT = (
    "Ways out: return the tensor from the step and read it after `run`; use torch.where for a choice between values, "
    "torch.cond for a branch, millrace.graph.scan for a loop; use a mask instead of a selection of unknown size."
)


def refuse_hidden_read(func: Any, args: Sequence[Any], line: str) -> None:
    """Refuse an operator whose result Python sees, or whose result's size depends on values."""
    if func in _HIDDEN_READS and not _constant(args):
        raise TraceError(f"{line}this {_HIDDEN_READS[func]}, and a graph is made before values exist.\n  {WAYS_OUT}")


def _constant(args: Sequence[Any]) -> bool:
    """Whether the first argument's value is known while tracing (a literal made inside the step)."""
    return bool(args) and isinstance(args[0], Tensor) and getattr(args[0], "constant", None) is not None


def refuse_unknown_size(result: Any, line: str) -> None:
    """Refuse a result whose size torch could not tell."""
    if any(tensor._has_symbolic_sizes_strides for tensor in tensors_in((result,))):
        raise TraceError(f"{line}this {_UNKNOWN_SIZE}, and a graph is made before values exist.\n  {WAYS_OUT}")


def refuse_hidden_generator(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], line: str) -> None:
    """Refuse an operator that draws random numbers where none of ours can take their place."""
    if not isinstance(func, OpOverload) or torch.Tag.nondeterministic_seeded not in func.tags:
        return
    given = {a.name: a.default_value for a in func._schema.arguments}
    given |= dict(zip(given, args, strict=False)) | dict(kwargs)
    if given.get("generator") is not None:
        raise TraceError(
            f"{line}`{func}` draws from a torch.Generator of its own, whose state a graph cannot hold. "
            "Leave the `generator` argument out: the step's own stream is used, seeded by `seed`."
        )
    dropout = given.get("dropout_p", given.get("dropout"))
    if dropout != 0:  # fused attention and recurrent layers draw for the sake of their dropout alone
        raise TraceError(
            f"{line}`{func}` draws random numbers from a hidden generator, and millrace has none to put in its place. "
            "Use torch.rand, randn, bernoulli or dropout, or draw before the step and pass the numbers in the batch."
        )


class Outsiders:
    """Tensors and optimizers that a step uses without having been given them as variables.

    Real tensors become constants of the graph, which is right for tables and masks, and wrong for what learns.
    `names`: variable names by the identity of the caller's own tensors. `optimizers`: those that are variables.
    """

    def __init__(self, names: Mapping[int, str], optimizers: Iterable[Optimizer]) -> None:
        self._names = names
        self._optimizers = {id(optimizer) for optimizer in optimizers}

    def refuse_optimizer(self, optimizer: Optimizer) -> None:
        """Refuse the step of an optimizer whose updates would be lost."""
        if id(optimizer) not in self._optimizers:
            raise TraceError(
                f"{user_line()}: this {type(optimizer).__name__} optimizer is not among the variables, so its updates "
                'would be lost. Name it, as in trace(step, {"": model, "optimizer": optimizer}, batch).'
            )

    def refuse(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], line: str) -> None:
        """Refuse an operator that reads something that learns, or writes something real."""
        for tensor in tensors_in((*args, *kwargs.values())):
            if isinstance(tensor, FakeTensor):
                continue
            name = self._names.get(id(tensor))
            if name is not None:
                raise TraceError(
                    f"{line}this uses the tensor that was named {name!r} itself, rather than what the step is given "
                    f"for it. Take it from the step's first argument, v[{name!r}], or from its module."
                )
            if tensor.requires_grad and torch.is_grad_enabled():
                raise TraceError(
                    f"{line}this uses a tensor of shape {list(tensor.shape)} that requires a gradient and is not among "
                    "the variables. Name it, or its module, as a variable; or detach it, to have a constant."
                )
        for tensor in written_by(func, args, kwargs):
            if not isinstance(tensor, FakeTensor):
                raise TraceError(
                    f"{line}this changes a tensor of shape {list(tensor.shape)} that is not among the variables, so "
                    "the change would be lost. Name it, or its module, as a variable."
                )


def written_by(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors among the arguments that an operator writes to."""
    if not isinstance(func, OpOverload) or not func._schema.is_mutable:
        return
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tensors_in((args[position] if position < len(args) else kwargs.get(argument.name),))


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values and the lists and tuples among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
