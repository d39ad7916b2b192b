"""Notes, for every operator that is traced, where it comes from; replaces randomness; refuses what has no graph.

A dispatch mode sits above the tracer, so that it sees each ATen operator just before a node is made for it. Module
hooks keep the stack of module paths. A backward operator runs inside an autograd node, whose sequence number tells the
forward operator that it belongs to, and so its module and the user's line.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from millrace.graph.graph import Wish
from millrace.graph.random import REPLACEMENTS, RandomStream
from millrace.graph.signature import Phase
from millrace.graph.tracing.device_scopes import current_wishes
from millrace.graph.tracing.refusals import (
    Outsiders,
    refuse_hidden_generator,
    refuse_hidden_read,
    refuse_unknown_size,
    tensors_in,
)
from millrace.graph.tracing.stand_ins import stand_ins
from millrace.graph.tracing.user_code import user_line
from millrace.graph.tracing.variables import Holders

# Keys under node.meta["custom"], which torch copies from node to node through every retracing.
ORIGIN = "millrace_origin"
# The attribute of a fake tensor that says at which line it was made.
LINE = "millrace_line"

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an operator comes from. `inside` says that a module was running (the root's own path is "").

    device, together: see `NodeInfo`.
    sequence: autograd's number of the forward operator, counted from the beginning of the step.
    """

    scope: str = ""
    phase: Phase | None = None  # None: decided by dataflow, once the graph is whole
    line: str = ""
    inside: bool = False
    device: Wish | None = None
    together: Wish | None = None
    sequence: int | None = None


class Recorder(TorchDispatchMode):
    """Use as a context around the step while it is traced."""

    # The bodies of torch.cond and its kin are traced by Dynamo, which stands aside for modes of users; this one is,
    # as the tracer below it is, part of the tracing.
    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    def __init__(self, holders: Holders, random: RandomStream) -> None:
        super().__init__()
        self.random = random
        self._scopes = holders.scopes()
        self._outsiders = Outsiders(
            {id(slot.tensor): name for name, slot in holders.slots.items()},
            [state.optimizer for state in holders.optimizers.values()],
        )
        self._stack: list[str] = []
        self._updating = 0
        self._forward_of: dict[int, Origin] = {}
        self._first = _newest_sequence()
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
            path = f"{parent}.{module._get_name()}" if parent else module._get_name()
        self._stack.append(path)

    def _leave(self, _module: nn.Module, _args: Any, _result: Any) -> None:
        # A module whose forward raised may have left inner paths behind; they end with the trace.
        if self._stack:
            self._stack.pop()

    def _start_update(self, optimizer: Optimizer, *_: Any) -> None:
        self._outsiders.refuse_optimizer(optimizer)
        self._updating += 1

    def _end_update(self, *_: Any) -> None:
        self._updating -= 1

    def _origin(self) -> Origin:
        node: Any = torch._C._current_autograd_node()  # None outside of the backward pass
        device, together = current_wishes()
        if node is not None:
            known = self._forward(node._sequence_nr())
            if self._stack:  # recomputation of a checkpointed module
                wishes = device or known.device, together or known.together
                return Origin(self._stack[-1], Phase.BACKWARD, user_line() or known.line, True, *wishes, known.sequence)
            device, together = known.device or device, known.together or together
            return dataclasses.replace(known, phase=Phase.BACKWARD, device=device, together=together)
        if self._updating and not self._stack:  # a closure of the optimizer may run the model
            return Origin("", Phase.UPDATE, user_line(), False, device, together)
        inside = bool(self._stack)
        # Autograd has just made the node of this operator, if it needs one: the newest number is its.
        number = _newest_sequence()
        scope, phase = (self._stack[-1], Phase.FORWARD) if inside else ("", None)
        origin = Origin(scope, phase, user_line(), inside, device, together, max(number - self._first, 0))
        self._forward_of.setdefault(number, origin)
        return origin

    def _forward(self, number: int) -> Origin:
        """The forward operator of a number. An operator may take several, and only the first of them is known."""
        if number > _newest_sequence():  # of a node that stands for a variable
            return Origin()
        while number not in self._forward_of and number > self._first:
            number -= 1
        return self._forward_of.get(number, Origin())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.last = origin = self._origin()
        fx_traceback.current_meta["custom"] = {ORIGIN: origin}
        if origin.phase is not Phase.BACKWARD:
            self._outsiders.refuse(func, args, kwargs, where(origin))
        if func is aten.native_batch_norm.default and args[5] and args[3] is not None:
            # In training it changes the running statistics behind its schema's back; this one says so.
            with self:
                return aten._native_batch_norm_legit.default(*args, **kwargs)
        if func in REPLACEMENTS and kwargs.get("generator") is None:
            replacement: Callable[..., Any] = REPLACEMENTS[func]
            with self:  # its operators are recorded, too
                return replacement(self.random, *args, **kwargs)
        refuse_hidden_generator(func, args, kwargs, where(origin))
        refuse_hidden_read(func, args, where(origin))
        result = func(*args, **kwargs)
        refuse_unknown_size(result, where(origin))
        for tensor in tensors_in((result,)):
            setattr(tensor, LINE, origin.line)
        return result


def _newest_sequence() -> int:
    return int(torch._C._autograd._get_sequence_nr()) - 1


def where(origin: Origin) -> str:
    """ "file.py:12 in forward (module encoder.fc): ", as far as known."""
    module = f" (module {origin.scope})" if origin.scope else ""
    return f"{origin.line}{module}: " if origin.line else ""
