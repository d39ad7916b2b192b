"""Removing mutations: by renaming where that is possible, by torch's functionalization otherwise; always the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from millrace.graph.tracing.functional import functionalize, renamed, rerun

aten = torch.ops.aten
Program = Callable[[Tensor, Tensor], Tensor]


def _zero_row(live: list[Tensor], i: int, j: int) -> None:
    live[i][j % 3].zero_()


# Each acts on a list of live tensors, all [3, 3]; `i` and `j` choose among them. What they return is not used.
INSTRUCTIONS: dict[str, Callable[[list[Tensor], int, int], object]] = {
    "new": lambda live, i, j: live.append(live[i] * 0.5 + live[j]),
    "view_t": lambda live, i, j: live.append(live[i].t()),
    "view_flat": lambda live, i, j: live.append(live[i].contiguous().view(9).view(3, 3)),
    "add_": lambda live, i, j: live[i].add_(live[j], alpha=0.5),
    "mul_": lambda live, i, j: live[i].mul_(0.7),
    "copy_": lambda live, i, j: live[i].copy_(live[j]),
    "zero_row": _zero_row,
    "clamp_": lambda live, i, j: live[i].clamp_(-1.0, 1.0),
    "detach": lambda live, i, j: live.append(live[i].detach()),
}
programs = st.lists(
    st.tuples(st.sampled_from(sorted(INSTRUCTIONS)), st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=9
)


def _run(instructions: list[tuple[str, int, int]], x: Tensor, w: Tensor) -> Tensor:
    live = [x, w, x + w]
    for name, i, j in instructions:
        with torch.no_grad():
            INSTRUCTIONS[name](live, i % len(live), j % len(live))
    return torch.stack([value.sum() for value in live])


def _recorded(program: Program) -> GraphModule:
    return make_fx(program, tracing_mode="fake", _allow_non_fake_inputs=True)(*_inputs())


def _inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(3, 3, generator=generator, dtype=torch.float64),
        torch.randn(3, 3, generator=generator, dtype=torch.float64),
    )


def _effect(program: Any) -> list[Tensor]:
    """What a program returns and leaves in its inputs."""
    x, w = _inputs()
    result = program(x, w)
    return [result[0] if isinstance(result, list | tuple) else result, x, w]


def _mutations(module: GraphModule) -> list[str]:
    """Mutating nodes other than the final copies into inputs."""
    return [
        node.name
        for node in module.graph.nodes
        if node.op == "call_function"
        and getattr(node.target, "_schema", None) is not None
        and node.target._schema.is_mutable
        and not (node.target is aten.copy_.default and node.args[0].op == "placeholder")
    ]


@settings(max_examples=60, deadline=None)
@given(programs)
def test_random_programs_keep_their_effect(instructions: list[tuple[str, int, int]]) -> None:
    def program(x: Tensor, w: Tensor) -> Tensor:
        return _run(instructions, x, w)

    try:
        expected = _effect(program)
    except RuntimeError:  # eager PyTorch refuses to write a tensor over its own transpose
        assume(False)
    recorded = _recorded(program)
    quick = renamed(recorded)
    for module in [functionalize(recorded), rerun(recorded), *([quick] if quick else [])]:
        module.recompile()
        assert not _mutations(module)
        for got, want in zip(_effect(module), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("instructions", "simple"),
    [
        ([("add_", 0, 1), ("new", 0, 0)], True),
        ([("detach", 0, 0), ("add_", 3, 1), ("new", 0, 0)], True),  # detach is the same memory, seen whole
        ([("view_t", 2, 0), ("mul_", 3, 0)], False),  # the sum is read again at the end, through the other view
        ([("zero_row", 0, 1)], False),  # a part of a variable
    ],
)
def test_only_simple_mutations_are_renamed(instructions: list[tuple[str, int, int]], simple: bool) -> None:
    recorded = _recorded(lambda x, w: _run(instructions, x, w))
    assert (renamed(recorded) is not None) is simple


def test_a_mutation_that_casts_is_left_to_torch() -> None:
    def program(x: Tensor, w: Tensor) -> Tensor:
        low = x.to(torch.float32)
        low.add_(w)  # float64 into float32
        return low

    recorded = _recorded(program)
    assert renamed(recorded) is None
    assert functionalize(recorded)(*_inputs()).dtype is torch.float32


def test_batch_norm_statistics_become_values() -> None:
    def program(x: Tensor, mean: Tensor) -> Tensor:
        variance = torch.ones(3, dtype=x.dtype)
        out, _, _ = aten._native_batch_norm_legit.default(x, None, None, mean[0], variance, True, 0.1, 1e-5)
        return out + variance

    recorded = _recorded(program)
    module = functionalize(recorded)  # mean[0] is part of an input: torch's way
    for got, want in zip(_effect(module), _effect(program), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
