"""What the tracing tests share: running a graph by hand, and comparing it with the same step in eager PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from millrace.graph.graph import Graph
from millrace.graph.signature import Role
from millrace.graph.trace import flatten_feed, trace

Given = dict[str, Any]
Step = Callable[[Given, Any], Any]


class Runner:
    """A graph with values for its variables, run node by node; the graph's own `initial` values stay as they are."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.variables = {v.name: graph.initial[v.name].detach().clone() for v in graph.variables}

    @torch.no_grad()
    def step(self, batch: Any) -> dict[str, Tensor]:
        """Run one step; returns the fetches."""
        results = list(self.graph.module(*self.variables.values(), *flatten_feed(batch)[0].values()))
        fetched = dict(zip(self.graph.fetches, results, strict=False))
        for name, value in zip(self.graph.updates, results[len(fetched) :], strict=True):
            self.variables[name] = value.clone()
        return fetched


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def values_in(given: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor in modules, tensors and optimizers, by the name that a graph gives it; found independently."""
    found: dict[str, Tensor] = {}
    for prefix, value in given.items():
        if isinstance(value, nn.Module):
            found.update(dict(value.named_parameters(prefix)))
            found.update(dict(value.named_buffers(prefix)))
        elif isinstance(value, Tensor):
            found[prefix] = value
    names = {id(tensor): name for name, tensor in found.items()}
    for prefix, value in given.items():
        if isinstance(value, torch.optim.Optimizer):
            many = len(value.param_groups) > 1
            for index, group in enumerate(value.param_groups):
                rate = f"group{index}/lr" if many else "lr"
                found[f"{prefix}/{rate}"] = torch.as_tensor(group["lr"], dtype=torch.float64)
                for parameter in group["params"]:
                    for key, slot in value.state.get(parameter, {}).items():
                        found[f"{prefix}/{names[id(parameter)]}/{key}"] = torch.as_tensor(slot)
    return found


def match_eager(
    build: Callable[[], Given],
    step: Step,
    batches: Sequence[Any],
    *,
    dtype: torch.dtype = torch.float64,
    steps: int = 5,
    variables_within: float | None = None,
    fetches_within: float | None = None,
) -> Runner:
    """Trace `step` over what `build` makes, run it and eager PyTorch side by side, and assert that they agree.

    By default float64 agrees to 1e-9 on every fetch and variable, float32 to 1e-4 (relative) on every fetch.
    """
    double = dtype == torch.float64
    fetches_within = fetches_within or (1e-9 if double else 1e-4)
    variables_within = variables_within or (1e-9 if double else None)
    with default_dtype(dtype):
        torch.manual_seed(0)
        given = build()
        torch.manual_seed(0)
        reference = build()
        before = {name: value.detach().clone() for name, value in values_in(given).items()}
        wants = {k: v.requires_grad for k, v in reference.items() if isinstance(v, Tensor)}
        runner = Runner(trace(step, given, batches[0]))
        for index in range(steps):
            batch = batches[index % len(batches)]
            got = runner.step(batch)
            expected = flatten_feed(step(reference, batch))[0]
            for name, wanted in wants.items():
                reference[name] = reference[name].detach().requires_grad_(wanted)
            assert set(got) == set(expected)
            for name, value in expected.items():
                scale = max(1e-12, float(value.detach().abs().max()))
                error = float((got[name] - value.detach()).abs().max()) / scale
                assert error <= fetches_within, f"step {index}: fetch {name} is off by {error:.2e} (relative)"
    for name, value in before.items():
        assert torch.equal(values_in(given)[name], value), f"tracing or running changed the caller's own {name}"
    assert_same_variables(runner, reference, variables_within)
    return runner


def assert_same_variables(runner: Runner, reference: Given, within: float | None) -> None:
    expected = values_in(reference)
    for variable in runner.graph.variables:
        if variable.role is Role.RANDOM:
            continue
        assert variable.name in expected, f"the graph has a variable {variable.name} that eager PyTorch lacks"
        got, want = runner.variables[variable.name], expected[variable.name].detach()
        assert got.shape == want.shape
        if within is not None and got.numel():
            error = float((_wide(got) - _wide(want)).abs().max())
            assert error <= within, f"{variable.name} is off by {error:.2e}"


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_complex() else tensor.double()


def training(
    model: Callable[[], nn.Module],
    loss: Callable[[nn.Module, Any], Tensor],
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
) -> tuple[Callable[[], Given], Step]:
    """`build` and `step` of the usual case: a module, a loss and an optimizer."""

    def build() -> Given:
        made = model().to(torch.get_default_dtype())
        return {"": made, "optimizer": optimizer(made)}

    def step(v: Given, batch: Any) -> dict[str, Tensor]:
        value = loss(v[""], batch)
        v["optimizer"].zero_grad()
        value.backward()
        v["optimizer"].step()
        return {"loss": value}

    return build, step


def importable_torchvision() -> None:
    """Let torchvision be imported where its compiled operators do not fit the torch at hand.

    Its Python part registers fake rules for two operators that are missing then; transformers and timm import it.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
        global _stub
        _stub = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            _stub.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_stub: torch.library.Library | None = None
