"""What went wrong while tracing, in the user's terms: the line, the reason and the way out."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    UnsupportedOperatorException,
)
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from millrace.errors import MillraceError, TraceError
from millrace.graph.tracing.recorder import ORIGIN, Origin, Recorder, where
from millrace.graph.tracing.refusals import PRINTED, WAYS_OUT, WHILE_WITH_GRADIENT
from millrace.graph.tracing.user_code import definition_of, line_of, names_a_line, user_line

_VALUES = (
    "the step decides something in Python by a tensor's value (`if`, `while`, `.item()`, a selection of unknown size), "
    f"and a graph is made before values exist.\n  {WAYS_OUT}"
)
_NO_RULE = (
    "an operator has no rule for fake tensors (shapes without values), so it cannot be traced.\n"
    "  Way out: if it is yours, register one with torch.library.register_fake; see docs/custom-ops.md."
)
_MEMORY = (
    "the step reaches for a tensor's memory (a compiled kernel, data_ptr, copy.deepcopy), and a graph is made before "
    "there is any.\n  Ways out: register a kernel as an operator, see docs/custom-ops.md; in place of a copied module "
    "use torch.func.functional_call with other parameters."
)
_STRAY = (
    "the step uses a tensor that was computed out of the tracer's sight: in another thread, or in an earlier trace and "
    "kept in a list or dictionary of yours.\n"
    "  Ways out: compute it in the step's own thread; return what is to be kept, and collect it after `run`."
)
# (what the message says, why and what to do)
_BY_TEXT = (
    (("no fake impl", "register_fake"), _NO_RULE),
    ((".numpy()", "FakeTensor.__format__"), PRINTED),
    (("data pointer", "data_ptr"), _MEMORY),
    (("Mixing fake modes",), _STRAY),
    (("data-dependent", "Could not guard", "GuardOnDataDependent", "_local_scalar_dense"), _VALUES),
)


_TORCHS_OWN = ("aten", "prims")


@contextlib.contextmanager
def explained(recorder: Recorder, step: Callable[..., Any]) -> Iterator[None]:
    """Turn what tracing raises into a TraceError that names the user's line.

    An error of the user's own making (a shape mismatch, a KeyError) passes with a note added, since its own message is
    the right one.
    """
    # It logs the shape mismatches that are about to be raised.
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    except TraceError as error:
        if names_a_line(str(error)):
            raise
        raise TraceError(f"{line_of(error) or definition_of(step)}: {error}") from error
    except MillraceError:
        raise
    except Exception as error:
        line = line_of(error) or where(recorder.last).removesuffix(": ") or definition_of(step)
        reason = _reason(error)
        if reason is None:
            error.add_note(f"while millrace was tracing the step, at {line}")
            raise
        raise TraceError(f"{line}: {reason}\n  PyTorch said: {_first_line(error)}") from error
    finally:
        logger.disabled = was_disabled


@contextlib.contextmanager
def at_the_call() -> Iterator[None]:
    """Let a TraceError name the user's line that runs now, the call of `trace`, when it names none."""
    try:
        yield
    except TraceError as error:
        line = user_line()
        if not line or names_a_line(str(error)):
            raise
        raise TraceError(f"{line}: {error}") from error


@contextlib.contextmanager
def functionalizing(recorded: GraphModule) -> Iterator[None]:
    """Turn what functionalization cannot do into a TraceError that names the line of the operator it cannot do."""
    try:
        yield
    except RuntimeError as error:
        for node in recorded.graph.nodes:
            target = node.target
            if isinstance(target, OpOverload) and target._schema.is_mutable and target.namespace not in _TORCHS_OWN:
                raise TraceError(
                    f"{_where(node)}the operator `{target}` changes an argument, and a graph's nodes have no effects.\n"
                    "  Way out: let it return the new value (mutates_args=()), and copy that where it belongs: "
                    "x.copy_(op(x)); see docs/custom-ops.md."
                ) from error
            if target is torch.ops.aten.as_strided.default and "as_strided" in str(error):
                raise TraceError(
                    f"{_where(node)}this makes a view by strides (as_strided) that is changed in place, which cannot "
                    "be followed.\n  Way out: index or slice the tensor instead."
                ) from error
        raise


def refuse_strays(recorded: GraphModule, step: Callable[..., Any]) -> None:
    """Refuse fake tensors among a recording's constants: their operators ran where the tracer did not see them."""
    for node in recorded.graph.find_nodes(op="get_attr"):
        if isinstance(getattr(recorded, str(node.target), None), FakeTensor):
            user = next(iter(node.users))
            line = _where(user) or f"{definition_of(step)}: "
            raise TraceError(f"{line}{_STRAY}")


def _where(node: Node) -> str:
    return where(node.meta.get("custom", {}).get(ORIGIN, Origin()))


def _reason(error: BaseException) -> str | None:
    text = f"{type(error).__name__}: {error}"
    stack = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    if "while_loop" in text or "while_loop" in stack:
        return WHILE_WITH_GRADIENT
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        return (
            f"the result of `{error.func}` depends on values in its size, or is read by Python, and a graph is made "
            f"before values exist.\n  {WAYS_OUT}"
        )
    if isinstance(error, GuardOnDataDependentSymNode):
        return _VALUES
    if isinstance(error, UnsupportedOperatorException):
        return _NO_RULE
    for needles, reason in _BY_TEXT:
        if any(needle in text for needle in needles):
            return reason
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
