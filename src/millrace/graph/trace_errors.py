"""What went wrong while tracing, in the user's terms: the line, the reason and the way out."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from millrace.errors import MillraceError, TraceError
from millrace.graph.recorder import Recorder, where
from millrace.graph.refusals import WAYS_OUT, WHILE_WITH_GRADIENT
from millrace.graph.user_code import definition_of, line_of, names_a_line, user_line

_VALUES = (
    "the step decides something in Python by a tensor's value (`if`, `while`, `.item()`, a selection of unknown size), "
    f"and a graph is made before values exist.\n  {WAYS_OUT}"
)
_PRINTED = (
    "the step formats a tensor's value or hands it to NumPy, and a graph is made before values exist.\n"
    "  Ways out: return the tensor from the step and print it after `run`; write it with torch's own operators; or "
    "register it as an operator, see docs/custom-ops.md."
)
_CHECKPOINT = (
    "reentrant checkpointing runs a backward pass of its own inside the backward pass, which cannot be recorded.\n"
    "  Way out: torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
)
_NO_RULE = (
    "an operator has no rule for fake tensors (shapes without values), so it cannot be traced.\n"
    "  Way out: if it is yours, register one with torch.library.register_fake; see docs/custom-ops.md."
)
# (what the message says, why and what to do)
_BY_TEXT = (
    (("no fake impl", "register_fake"), _NO_RULE),
    ((".numpy()", "FakeTensor.__format__"), _PRINTED),
    (("data-dependent", "Could not guard", "GuardOnDataDependent", "_local_scalar_dense"), _VALUES),
    (("use_reentrant", "CheckpointFunctionBackward", "checkpointing is not compatible"), _CHECKPOINT),
)


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


def _reason(error: BaseException) -> str | None:
    text = f"{type(error).__name__}: {error}"
    stack = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    if "while_loop" in text or "while_loop" in stack:
        return WHILE_WITH_GRADIENT
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException | GuardOnDataDependentSymNode):
        return _VALUES
    if isinstance(error, UnsupportedOperatorException):
        return _NO_RULE
    for needles, reason in _BY_TEXT:
        if any(needle in text for needle in needles):
            return reason
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
