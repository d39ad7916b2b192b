"""What went wrong while tracing, in the user's terms: the line, the reason and the way out."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator

from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from millrace.errors import MillraceError, TraceError
from millrace.graph.recorder import Recorder, is_users, where

_VALUES = (
    "the step decides something in Python by a tensor's value (`if`, `while`, `.item()`, a selection of unknown size), "
    "and a graph is made before values exist.\n"
    "  Ways out: return the tensor from the step and read it after `run`; torch.where for a choice between values, "
    "torch.cond for a branch, millrace.graph.scan for a loop, a mask instead of a selection."
)
_CHECKPOINT = (
    "reentrant checkpointing runs a backward pass of its own inside the backward pass, which cannot be recorded.\n"
    "  Way out: torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
)
_WHILE = (
    "a loop whose length is known only at run time has no gradient here.\n"
    "  Ways out: millrace.graph.scan over a fixed number of steps with a mask for those beyond the end, "
    "or a Python `for` over a fixed range."
)
# (what the message says, why and what to do)
_BY_TEXT = (
    (("data-dependent", "Could not guard", "GuardOnDataDependent", "_local_scalar_dense"), _VALUES),
    (("use_reentrant", "CheckpointFunctionBackward", "CheckpointFunction", "checkpointing is not compatible"), _CHECKPOINT),
    (("while_loop",), _WHILE),
)


@contextlib.contextmanager
def explained(recorder: Recorder) -> Iterator[None]:
    """Turn what tracing raises into a TraceError that names the user's line.

    An error of the user's own making (a shape mismatch, a KeyError) passes with a note added, since its own message is
    the right one.
    """
    try:
        yield
    except MillraceError:
        raise
    except Exception as error:
        line = user_line_of(error) or where(recorder.last).removesuffix(": ")
        reason = _reason(error)
        if reason is None:
            error.add_note(f"while millrace was tracing the step, at {line}" if line else "while tracing the step")
            raise
        raise TraceError(f"{line}: {reason}\n  PyTorch said: {_first_line(error)}") from error


def _reason(error: BaseException) -> str | None:
    text = f"{type(error).__name__}: {error}"
    stack = "".join(f"{frame.filename} {frame.name}" for frame in traceback.extract_tb(error.__traceback__))
    if "while_loop" in text or "while_loop" in stack:
        return _WHILE
    if "checkpoint.py" in stack and "CheckpointFunction" in text + stack:
        return _CHECKPOINT
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException | GuardOnDataDependentSymNode):
        return _VALUES
    if isinstance(error, UnsupportedOperatorException):
        return (
            f"the operator {error.func} has no rule for fake tensors (shapes without values), so it cannot be traced.\n"
            "  Way out: if it is yours, register one with torch.library.register_fake; see docs/custom-ops.md."
        )
    for needles, reason in _BY_TEXT:
        if any(needle in text for needle in needles):
            return reason
    return None


def user_line_of(error: BaseException) -> str:
    """The innermost of the user's lines in a traceback, "file.py:12 in forward"; "" when there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_users(frame.filename):
            return f"{frame.filename}:{frame.lineno} in {frame.name}"
    return ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
