"""Modules while they are traced: other tensors stand in for their parameters and buffers, and afterwards each module is
as it was.

A forward pass may leave things behind in its module: a count of calls, a cached table, a loss kept for later. The
tensors among them would be shapes without values, of use to nobody, so every attribute is set back. A number that the
step has changed is worth a warning, since a graph runs no Python: it keeps the value of the first run.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from millrace.errors import TraceError
from millrace.graph.tracing.user_code import stack_level

_UNSEEN = ("training",)  # of no consequence for a graph: the mode in which it was traced stays


def refuse_module(prefix: str, module: nn.Module) -> None:
    """Refuse modules that hide their tensors, or that split the batch by themselves.

    Raises: TraceError naming the module and the way out.
    """
    for path, child in module.named_modules(prefix=prefix):
        name = f"module {path!r}" if path else "the module"
        if isinstance(child, torch.jit.ScriptModule):
            raise TraceError(
                f"{name} is a TorchScript module ({type(child).__name__}), which keeps its tensors to itself. "
                "Pass the ordinary module that it was made from."
            )
        if isinstance(child, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise TraceError(
                f"{name} is a {type(child).__name__}, which splits batches and adds gradients behind the graph's back. "
                "Pass the module inside (`.module`): in millrace, copies of a step are made from its graph."
            )
        for own, tensor in (*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)):
            if is_lazy(tensor):
                raise TraceError(
                    f"{name} ({type(child).__name__}) has no shape yet for its {own!r}. "
                    "Call the model once on an example before tracing it."
                )


@contextlib.contextmanager
def module_with(prefix: str, module: nn.Module, by_id: Mapping[int, Tensor]) -> Iterator[None]:
    """Replace every parameter and buffer under `module` for a while; on leaving, all its attributes are as before."""
    children = dict(module.named_modules(prefix=prefix))
    saved = {path: dict(vars(child)) for path, child in children.items()}
    tables = [(table, dict(table)) for child in children.values() for table in (child._parameters, child._buffers)]
    for table, content in tables:
        for name, tensor in content.items():
            if tensor is not None:
                # Straight into the table: nn.Module.__setattr__ would insist on nn.Parameter.
                table[name] = by_id[id(tensor)]
    for child in children.values():
        if isinstance(child, nn.RNNBase):
            child._flat_weights = [by_id.get(id(w), w) for w in child._flat_weights]
    try:
        yield
        for path, child in children.items():
            _warn_of_numbers(path, child, saved[path])
    finally:
        for path, child in children.items():
            child.__dict__.clear()
            child.__dict__.update(saved[path])
        for table, content in tables:
            table.clear()
            table.update(content)


def _warn_of_numbers(path: str, module: nn.Module, before: Mapping[str, Any]) -> None:
    """Warn of an attribute that is a number or a truth value, and that the step has changed."""
    for key, new in vars(module).items():
        old = before.get(key)
        if key in _UNSEEN or not isinstance(old, int | float) or not isinstance(new, int | float) or old == new:
            continue
        name = f"module {path!r}" if path else "the module"
        warnings.warn(
            f"{name} ({type(module).__name__}): the step changes `{key}` in Python, from {old} to {new}. A graph runs "
            f"no Python, so every step does what the first one did with it. If that matters, keep it in a buffer: "
            f'self.register_buffer("{key}", torch.tensor({old})).',
            stacklevel=stack_level(),
        )
