"""`with millrace.device("gpu:0"):` in model code: what it says of the nodes that are traced inside.

In plain PyTorch they do nothing. While a step is traced, the recorder asks what is open and writes it on every node; a
placement then honours it (`place/hints.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import cached_property
from types import CodeType
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch

from millrace.errors import SettingError
from millrace.graph.graph import Wish
from millrace.graph.tracing.user_code import named, user_position

P = ParamSpec("P")
R = TypeVar("R")


class _Opened:
    """A scope that was entered: its name, and where, which is put in words only if a trace asks for it."""

    def __init__(self, name: str, position: tuple[CodeType, int] | None) -> None:
        self._name, self._position = name, position

    @cached_property
    def wish(self) -> Wish:
        return Wish(self._name, named(self._position))


_device: ContextVar[_Opened | None] = ContextVar("millrace_device", default=None)
_together: ContextVar[_Opened | None] = ContextVar("millrace_together", default=None)


class _Scope:
    _open: ClassVar[ContextVar[_Opened | None]]
    _expected: ClassVar[str]

    def __init__(self, name: str | None) -> None:
        if name is not None and (not isinstance(name, str) or not name.strip()):
            raise SettingError(
                f"{type(self).__name__}({name!r}): expected {self._expected}, or None to lift the others."
            )
        self._name = name or ""
        self._outer: list[_Opened | None] = []

    def __enter__(self) -> None:
        if torch.compiler.is_dynamo_compiling():  # the bodies of loops and branches, which are one node outside
            return
        self._outer.append(self._open.get())
        self._open.set(_Opened(self._name, user_position()))

    def __exit__(self, *_: object) -> None:
        if not torch.compiler.is_dynamo_compiling():
            self._open.set(self._outer.pop())


class device(_Scope):
    """Say in model code where a part of it is to run.

    For the case in which only the model knows: `with millrace.device("gpu:0"): x = self.encoder(x)`. It holds for what
    is computed inside, for the gradients of that, and for the update of the variables that are read there (unless
    `Hints` say otherwise of them). Of nested ones the inner wins. A placement refuses what cannot be; without a
    placement, and in plain PyTorch, it says nothing. A loop or branch of the graph (`scan`, `cond`) is one node: put it
    inside, not the other way round.

    Args:
        name: a device ("gpu:0", "/host:0/gpu:0") or a kind ("cpu", "gpu"); None lifts the ones around it.

    Raises: SettingError when it is neither text nor None.
    """

    _open = _device
    _expected = 'the name of a device ("gpu:0") or a kind ("cpu")'


class colocate(_Scope):
    """Say in model code which parts of it share one device, whichever that is.

    All that is computed under the same name goes together, with its gradients and the updates of the variables that are
    read there: `with millrace.colocate("attention"): …`. Of nested ones the inner wins.

    Args:
        name: any; None lifts the ones around it.

    Raises: SettingError when it is neither text nor None.
    """

    _open = _together
    _expected = "a name, the same for all that go together"


def current_wishes() -> tuple[Wish | None, Wish | None]:
    """What is said here of the device, and of what to be with."""
    device, together = _device.get(), _together.get()
    return device.wish if device else None, together.wish if together else None


def in_these_scopes(function: Callable[P, R]) -> Callable[P, R]:
    """A function that runs under the scopes that are open now, whenever it is called."""
    opened: list[tuple[ContextVar[Any], _Opened | None]] = [(each, each.get()) for each in (_device, _together)]

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        before = [(each, each.set(scope)) for each, scope in opened]
        try:
            return function(*args, **kwargs)
        finally:
            for each, token in before:
                each.reset(token)

    return run
