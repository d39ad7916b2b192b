"""Functions over arrays that numba compiles when they are first called, where it is installed.

Without numba (the extra `place`) the same functions run as plain Python: as correct, and some hundred times slower. The
machine code is kept in the user's cache directory, so that only the first process compiles. Processes that begin
together compile once, too: the others wait, and load it then.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import importlib.util
import os
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from millrace.files import others_may_write, user_cache

_LONGEST_S = 120.0  # to wait for another process that compiles; then this one does, too
_AGAIN_S = 0.05


class Compiled:
    """A function that is compiled when it is first called: numba takes half a second to import."""

    def __init__(self, function: types.FunctionType) -> None:
        self.function = function
        self._ready: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        """Call it with numbers and arrays, always of the same types: each new type is compiled anew."""
        if self.at_hand:
            return self.ready()(*args)
        with _alone(_cache_directory(self.digest())):
            return self.ready()(*args)

    def ready(self) -> Callable[..., Any]:
        """The function itself, or the compiled one."""
        if self._ready is None:
            self._ready = self._compile() if importlib.util.find_spec("numba") else self.function
        return self._ready

    @property
    def at_hand(self) -> bool:
        """Whether the next call need not wait for the compiler: its machine code is kept, or there is no numba."""
        if self._ready is not None or not importlib.util.find_spec("numba"):
            return True
        directory = _cache_directory(self.digest())
        return directory is not None and any(directory.rglob("*.nbi"))

    def digest(self) -> str:
        """Tells this source and that of all functions that it calls from any other: numba looks at one file only."""
        inner = [value.digest() for value in self._called().values()]
        own = Path(self.function.__code__.co_filename).read_bytes()
        return hashlib.sha256(own + "".join(inner).encode()).hexdigest()[:16]

    def _called(self) -> dict[str, Compiled]:
        names = self.function.__globals__
        found = {name: names.get(name) for name in self.function.__code__.co_names}
        return {name: value for name, value in found.items() if isinstance(value, Compiled)}

    def _compile(self) -> Callable[..., Any]:
        numba = importlib.import_module("numba")
        # Compiled functions call each other through their globals, where numba must find its own kind of function.
        own = {name: value.ready() for name, value in self._called().items()}
        names = {**self.function.__globals__, **own}
        function = types.FunctionType(self.function.__code__, names, self.function.__name__)
        function.__module__, function.__qualname__ = self.function.__module__, self.function.__qualname__
        directory = _cache_directory(self.digest())
        if directory is None:
            return numba.njit(function)
        kept, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(directory)
        try:
            return numba.njit(cache=True)(function)
        finally:
            numba.config.CACHE_DIR = kept


def compiled(function: Callable[..., Any]) -> Compiled:
    """Mark a function for numba; it may call other such functions of its module."""
    assert isinstance(function, types.FunctionType)
    return Compiled(function)


def _cache_directory(digest: str) -> Path | None:
    """Where machine code is kept; None where this user cannot write, or others can: what is in it is run."""
    directory = user_cache() / "numba" / digest
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = directory.stat()
    except OSError:
        return None
    return None if others_may_write(status) or not os.access(directory, os.W_OK | os.X_OK) else directory


@contextlib.contextmanager
def _alone(directory: Path | None) -> Iterator[None]:
    """Inside, no other process compiles into a directory, unless one has for very long or files cannot be locked."""
    with contextlib.ExitStack() as stack:
        if directory is not None:
            with contextlib.suppress(OSError):
                file = stack.enter_context((directory / "lock").open("w"))
                _lock(file)
                stack.callback(fcntl.flock, file, fcntl.LOCK_UN)  # closing it is not enough where a child has it
        yield


def _lock(file: IO[str]) -> None:
    """Raises: OSError when it cannot be locked, or not in time."""
    until_s = time.monotonic() + _LONGEST_S
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until_s:
                raise
        time.sleep(_AGAIN_S)
