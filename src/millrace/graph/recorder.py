"""Notes, for every operator that is traced, where it comes from; replaces randomness; refuses what has no graph.

A dispatch mode sits above the tracer, so that it sees each ATen operator just before a node is made for it. Module
hooks keep the stack of module paths. A backward operator runs inside an autograd node, whose sequence number tells the
forward operator that it belongs to, and so its module and the user's line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from millrace.errors import TraceError
from millrace.graph.random import REPLACEMENTS, RandomStream
from millrace.graph.signature import Phase
from millrace.graph.stand_ins import stand_ins

# Keys under node.meta["custom"], which torch copies from node to node through every retracing.
ORIGIN = "millrace_origin"

aten = torch.ops.aten

_HERE = str(Path(__file__).resolve().parent.parent) + os.sep
_TORCH = str(Path(torch.__file__).resolve().parent) + os.sep
_HIDDEN_READS = {
    torch.ops.aten._local_scalar_dense.default: "reads a tensor's value into Python (`.item()`, `float(t)`, `if t:`)",
    torch.ops.aten.nonzero.default: "makes a tensor whose size depends on values (`nonzero`, `x[mask]`, `where(mask)`)",
    torch.ops.aten.masked_select.default: "makes a tensor whose size depends on values (`masked_select`)",
    torch.ops.aten._unique2.default: "makes a tensor whose size depends on values (`unique`)",
}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an operator comes from. `inside` says that a module was running (the root's own path is "")."""

    scope: str = ""
    phase: Phase | None = None  # None: decided by dataflow, once the graph is whole
    line: str = ""
    inside: bool = False


class Recorder(TorchDispatchMode):
    """Use as a context around the step while it is traced."""

    # The bodies of torch.cond and its kin are traced by Dynamo, which stands aside for modes of users; this one is,
    # as the tracer below it is, part of the tracing.
    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    def __init__(self, scopes: Mapping[int, str], random: RandomStream) -> None:
        super().__init__()
        self.random = random
        self._scopes = dict(scopes)
        self._stack: list[str] = []
        self._updating = 0
        self._forward_of: dict[int, Origin] = {}
        self.last = Origin()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Install the hooks and the mode, and take both away on leaving."""
        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
            register_optimizer_step_pre_hook(self._start_update),
            register_optimizer_step_post_hook(self._end_update),
        ]
        try:
            with stand_ins(self.random), self:
                yield
        finally:
            for handle in handles:
                handle.remove()
            fx_traceback.current_meta.pop("custom", None)

    def _enter(self, module: nn.Module, _args: Any) -> None:
        parent = self._stack[-1] if self._stack else ""
        path = self._scopes.get(id(module))
        if path is None:  # made inside the step, or not among the variables: it has no parameters
            path = f"{parent}.{type(module).__name__}" if parent else type(module).__name__
        self._stack.append(path)

    def _leave(self, _module: nn.Module, _args: Any, _result: Any) -> None:
        # A module whose forward raised may have left inner paths behind; they end with the trace.
        if self._stack:
            self._stack.pop()

    def _start_update(self, *_: Any) -> None:
        self._updating += 1

    def _end_update(self, *_: Any) -> None:
        self._updating -= 1

    def _origin(self) -> Origin:
        node = torch._C._current_autograd_node()
        if node is not None:
            known = self._forward_of.get(node._sequence_nr(), Origin())
            if self._stack:  # recomputation of a checkpointed module
                return Origin(self._stack[-1], Phase.BACKWARD, user_line() or known.line, True)
            return dataclasses.replace(known, phase=Phase.BACKWARD)
        if self._updating and not self._stack:  # a closure of the optimizer may run the model
            return Origin("", Phase.UPDATE, user_line())
        inside = bool(self._stack)
        origin = Origin(self._stack[-1] if inside else "", Phase.FORWARD if inside else None, user_line(), inside)
        # Autograd has just made the node of this operator, if it needs one: the newest number is its.
        self._forward_of.setdefault(torch.autograd._get_sequence_nr() - 1, origin)
        return origin

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.last = origin = self._origin()
        fx_traceback.current_meta["custom"] = {ORIGIN: origin}
        if func is aten.native_batch_norm.default and args[5] and args[3] is not None:
            # In training it changes the running statistics behind its schema's back; this one says so.
            return aten._native_batch_norm_legit.default(*args, **kwargs)
        if func in REPLACEMENTS and kwargs.get("generator") is None:
            replacement: Callable[..., Any] = REPLACEMENTS[func]
            with self:  # its operators are recorded, too
                return replacement(self.random, *args, **kwargs)
        if func in REPLACEMENTS:
            raise TraceError(
                f"{where(origin)}`{func}` draws from a torch.Generator of its own, whose state a graph cannot hold. "
                "Leave the `generator` argument out: the step's own stream is used, seeded by `seed`."
            )
        if isinstance(func, torch._ops.HigherOrderOperator):
            self.random.depth += 1
            try:
                return func(*args, **kwargs)
            finally:
                self.random.depth -= 1
        if func in _HIDDEN_READS and not _constant(args):
            raise TraceError(
                f"{where(origin)}this {_HIDDEN_READS[func]}, and a graph is made before values exist.\n"
                "  Ways out: return the tensor from the step and read it after `run`; use torch.where for a choice "
                "between values, torch.cond for a branch, millrace.graph.scan for a loop; use a mask instead of a "
                "selection of unknown size."
            )
        return func(*args, **kwargs)


def _constant(args: tuple[Any, ...]) -> bool:
    """Whether the first argument's value is known while tracing (a literal made inside the step)."""
    return bool(args) and isinstance(args[0], Tensor) and getattr(args[0], "constant", None) is not None


def where(origin: Origin) -> str:
    """"file.py:12 in forward (module encoder.fc): ", as far as known."""
    module = f" (module {origin.scope})" if origin.scope else ""
    return f"{origin.line}{module}: " if origin.line else ""


_owned: dict[str, bool] = {}


def is_users(filename: str) -> bool:
    """Whether a source file belongs to the user rather than to torch, millrace or Python itself."""
    known = _owned.get(filename)
    if known is None:
        library = filename.startswith((_TORCH, _HERE, "<frozen", "<string>", "<eval")) or "/lib/python3" in filename and (
            "site-packages" not in filename
        )
        known = _owned[filename] = not library
    return known


def user_line() -> str:
    """The innermost frame of the user's code: "model.py:31 in forward"; "" when there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if is_users(code.co_filename):
            return f"{os.path.relpath(code.co_filename) if _near(code.co_filename) else code.co_filename}:{frame.f_lineno} in {code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def _near(filename: str) -> bool:
    return filename.startswith(os.getcwd() + os.sep)
