"""Which lines of a running program are the user's, as opposed to torch's, Python's and our own."""

from __future__ import annotations

import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

_HERE = str(Path(__file__).resolve().parents[2]) + os.sep
_TORCH = str(Path(torch.__file__).resolve().parent) + os.sep
_owned: dict[str, bool] = {}


def is_users(filename: str) -> bool:
    """Whether a source file belongs to the user (or a library of models) rather than to torch, millrace or Python."""
    known = _owned.get(filename)
    if known is None:
        ours = filename.startswith((_TORCH, _HERE, "<frozen", "<string>", "<eval"))
        standard = "/lib/python3" in filename and "site-packages" not in filename
        known = _owned[filename] = not ours and not standard
    return known


def user_line() -> str:
    """The innermost of the user's lines that runs now: "model.py:31 in forward"; "" when there is none."""
    return named(user_position())


def user_position() -> tuple[CodeType, int] | None:
    """The innermost of the user's functions that runs now, and its line: quickly taken; `named` puts it in words."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_users(frame.f_code.co_filename):
            return frame.f_code, frame.f_lineno
        frame = frame.f_back
    return None


def named(position: tuple[CodeType, int] | None) -> str:
    """A position as `user_line` has it."""
    return _named(position[0].co_filename, position[1], position[0].co_name) if position else ""


def stack_level() -> int:
    """The `stacklevel` with which a warning points at the innermost of the user's lines, from the function that
    calls this one."""
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    return level if frame is not None else 1


def line_of(error: BaseException) -> str:
    """The innermost of the user's lines in an error's traceback; "" when there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_users(frame.filename):
            return _named(frame.filename, frame.lineno or 0, frame.name)
    return ""


def definition_of(function: Callable[..., Any]) -> str:
    """Where a function is defined, as a line; "" when that cannot be known. Of a wrapper, the function inside."""
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    return _named(code.co_filename, code.co_firstlineno, code.co_name) if code is not None else ""


def names_a_line(message: str) -> bool:
    """Whether a message begins with a line of code."""
    return re.match(r".*:\d+ in [^ ]+( \(module .*\))?: ", message.partition("\n")[0]) is not None


def _named(filename: str, line: int, function: str) -> str:
    near = filename.startswith(os.getcwd() + os.sep)
    return f"{os.path.relpath(filename) if near else filename}:{line} in {function}"
