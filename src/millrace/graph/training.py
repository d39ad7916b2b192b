"""The usual training step in one call: module + loss + optimizer + example batch -> graph."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from millrace.errors import TraceError
from millrace.graph.graph import Graph
from millrace.graph.signature import Role
from millrace.graph.trace import trace
from millrace.graph.tracing.variables import Value

Loss = Callable[[Any, Any], Any]
STEP = "step"
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


class UpdateRule(Protocol):
    """What an optimizer of `millrace.optim` offers: state as named tensors, and an update as a pure function."""

    def init(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state before the first step, by name ("optimizer/<parameter>/<slot>")."""
        ...

    def update(
        self,
        parameters: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
        step: Tensor,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """New parameters and new state."""
        ...


def training_graph(
    model: nn.Module,
    loss: Loss,
    optimizer: Optimizer | UpdateRule,
    batch: Any,
    *,
    precision: str = "float32",
    schedule: Callable[[Tensor], Tensor] | None = None,
    accumulate: int = 1,
    seed: int = 0,
) -> Graph:
    """Trace forward, backward and update of one step.

    Args:
        model: its parameters and buffers become variables under their own names.
        loss: `loss(model, batch) -> scalar`, or `-> (scalar, {name: tensor})` to have metrics fetched beside it.
        optimizer: any `torch.optim` optimizer over the model's parameters, or one of `millrace.optim`.
        batch: an example batch.
        precision: "float32", or "bfloat16" to run the loss under autocast.
        schedule: for a `torch.optim` optimizer: the factor on its learning rates at step n (0-dim int64 tensor).
        accumulate: for a `torch.optim` optimizer: update on the mean gradient of this many steps.
        seed: of the variable "random".

    Returns: a graph with the fetches "loss", the metrics, and "gradient/<parameter>" for every gradient. Its variables
    are the module's tensors, the optimizer's state, "step" (int64, counts calls) and, if drawn from, "random".

    Raises: TraceError, as `trace`; or when nothing is trainable, or the loss is not a scalar.
    """
    if precision not in PRECISIONS:
        raise TraceError(f"precision {precision!r}: expected one of {sorted(PRECISIONS)}")
    parameters: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise TraceError("the model has no parameter that requires a gradient, so there is nothing to train")
    device = next(iter(parameters.values())).device
    counter = Value(torch.zeros((), dtype=torch.int64, device=device), Role.STEP)
    variables: dict[str, Any] = {"": model, STEP: counter}
    if isinstance(optimizer, Optimizer):
        variables["optimizer"] = optimizer
        if accumulate > 1:
            variables |= {
                f"accumulated/{name}": Value(torch.zeros_like(p), Role.OPTIMIZER, name)
                for name, p in parameters.items()
            }
    else:
        state = optimizer.init(parameters)
        variables |= {name: Value(tensor, Role.OPTIMIZER, _owner(name, parameters)) for name, tensor in state.items()}
    modes = [(module, module.training) for module in model.modules()]

    def step(v: dict[str, Any], feed: Any) -> dict[str, Tensor]:
        with _in_modes(modes), _autocast(device, precision):
            value, metrics = split_loss(loss(model, feed))
        current: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if name in parameters}
        found = _gradients(value, list(current.values()))
        gradients = dict(zip(current, found, strict=True))
        with torch.no_grad():
            if isinstance(optimizer, Optimizer):
                _torch_update(v, optimizer, current, gradients, schedule, accumulate)
            else:
                _pure_update(v, optimizer, current, gradients)
            v[STEP] = v[STEP] + 1
        named = {f"gradient/{name}": g for name, g in gradients.items() if g is not None}
        return {"loss": value, **metrics, **named}

    functools.update_wrapper(step, loss, assigned=(), updated=())  # errors name the user's own function
    return trace(step, variables, batch, seed=seed)


def evaluation_graph(
    model: nn.Module, compute: Callable[[Any, Any], Any], batch: Any, *, precision: str = "float32"
) -> Graph:
    """Trace `compute(model, batch)` in evaluation mode and without gradients.

    `compute` may be a loss as `training_graph` takes it, or return a tensor or a nest of tensors (a prediction).
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def step(_: dict[str, Any], feed: Any) -> Any:
        modes = [(module, False) for module in model.modules()]
        with _in_modes(modes), _autocast(device, precision), torch.no_grad():
            result = compute(model, feed)
        if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
            value, metrics = split_loss(result)
            return {"loss": value, **metrics}
        return {"loss": result} if isinstance(result, Tensor) and result.ndim == 0 else result

    functools.update_wrapper(step, compute, assigned=(), updated=())
    return trace(step, {"": model}, batch)


def split_loss(result: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """What a loss function returned, as (scalar, metrics). Raises TraceError for anything else."""
    value, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if not isinstance(value, Tensor) or value.ndim or not isinstance(metrics, Mapping):
        got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TraceError(
            f"loss(model, batch) must return a scalar tensor, or (scalar tensor, dict of metrics); got {got}. "
            "Take `.mean()` of per-example losses."
        )
    return value, {str(k): t if isinstance(t, Tensor) else torch.tensor(t) for k, t in metrics.items()}


def _gradients(value: Tensor, parameters: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients of `value`, None where it does not depend on a parameter. Raises TraceError when on none of them."""
    found: tuple[Tensor | None, ...] = (None,)
    if value.requires_grad:
        found = torch.autograd.grad(value, parameters, allow_unused=True)
    if all(gradient is None for gradient in found):
        raise TraceError(
            "the loss does not depend on any parameter that requires a gradient, so there is nothing to train by. "
            "Usual causes: .detach() or torch.no_grad() on the way, or a loss computed from the batch alone."
        )
    return found


def _pure_update(
    v: dict[str, Any], rule: UpdateRule, parameters: dict[str, Tensor], gradients: dict[str, Tensor | None]
) -> None:
    known = {name: g for name, g in gradients.items() if g is not None}
    state = {name: tensor for name, tensor in v.items() if name.startswith("optimizer/")}
    new_parameters, new_state = rule.update(parameters, known, state, v[STEP])
    for name, tensor in new_parameters.items():
        if tensor is not parameters[name]:
            parameters[name].copy_(tensor)
    v.update(new_state)


def _torch_update(
    v: dict[str, Any],
    optimizer: Optimizer,
    parameters: dict[str, Tensor],
    gradients: dict[str, Tensor | None],
    schedule: Callable[[Tensor], Tensor] | None,
    accumulate: int,
) -> None:
    rates = [group["lr"] for group in optimizer.param_groups]
    if schedule is not None:
        # The optimizer's updates are counted, not the calls that only accumulate.
        factor = schedule(torch.div(v[STEP], accumulate, rounding_mode="floor"))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
    apply = None
    if accumulate > 1:
        apply = (v[STEP] + 1) % accumulate == 0
        for name, gradient in gradients.items():
            if gradient is not None:
                total = v[f"accumulated/{name}"] + gradient / accumulate
                gradients[name] = total
                v[f"accumulated/{name}"] = torch.where(apply, torch.zeros_like(total), total)
    for name, parameter in parameters.items():
        parameter.grad = gradients[name]
    kept = [*parameters.values(), *(t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor))]
    before = [tensor.clone() for tensor in kept] if apply is not None else []
    optimizer.step()
    for tensor, old in zip(kept, before, strict=False):
        tensor.copy_(torch.where(apply, tensor, old))  # type: ignore[arg-type]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _owner(slot: str, parameters: Mapping[str, Tensor]) -> str:
    """The parameter in the middle of "optimizer/<parameter>/<slot>"."""
    middle = slot.removeprefix("optimizer/").rpartition("/")[0]
    return middle if middle in parameters else slot


@contextlib.contextmanager
def _in_modes(modes: list[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Each module in its given training mode, and back."""
    saved = [(module, module.training) for module, _ in modes]
    try:
        for module, training in modes:
            module.training = training
        yield
    finally:
        for module, training in saved:
            module.training = training


def _autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()
