"""Functions over arrays that numba compiles when they are first called, where it is installed.

Without numba (the extra `place`) the same functions run as plain Python: as correct, and some hundred times slower. The
machine code is kept in the user's cache directory, so that only the first process waits for the compiler.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import stat
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Compiled:
    """A function that is compiled when it is first called: numba takes half a second to import."""

    def __init__(self, function: types.FunctionType) -> None:
        self.function = function
        self._ready: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        """Call it with numbers and arrays, always of the same types: each new type is compiled anew."""
        return self.ready()(*args)

    def ready(self) -> Callable[..., Any]:
        """The function itself, or the compiled one."""
        if self._ready is None:
            self._ready = self._compile() if importlib.util.find_spec("numba") else self.function
        return self._ready

    def _compile(self) -> Callable[..., Any]:
        numba = importlib.import_module("numba")
        # Compiled functions call each other through their globals, where numba must find its own kind of function.
        names = self.function.__globals__
        called = {name: names[name] for name in self.function.__code__.co_names if name in names}
        own = {name: value.ready() for name, value in called.items() if isinstance(value, Compiled)}
        function = types.FunctionType(self.function.__code__, {**names, **own}, self.function.__name__)
        function.__module__, function.__qualname__ = self.function.__module__, self.function.__qualname__
        directory = _cache_directory()
        if directory is None:
            return numba.njit(function)  # type: ignore[no-any-return]
        kept, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(directory)
        try:
            return numba.njit(cache=True)(function)  # type: ignore[no-any-return]
        finally:
            numba.config.CACHE_DIR = kept


def compiled(function: Callable[..., Any]) -> Compiled:
    """Mark a function for numba; it may call other such functions of its module."""
    assert isinstance(function, types.FunctionType)
    return Compiled(function)


def is_compiled() -> bool:
    """Whether numba is there."""
    return importlib.util.find_spec("numba") is not None


def _cache_directory() -> Path | None:
    """Where machine code is kept; None where this user cannot write, or others can: what is in it is run."""
    named = os.environ.get("MILLRACE_CACHE")
    base = (
        Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "millrace"
    )
    directory = base.absolute() / "numba"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = directory.stat()
    except OSError:
        return None
    foreign = status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return None if foreign or not os.access(directory, os.W_OK | os.X_OK) else directory
