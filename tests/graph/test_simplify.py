"""Simplified graphs compute the same bits with fewer nodes, and what only looks superfluous stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from millrace.graph.check import check
from millrace.graph.graph import Graph
from millrace.graph.passes.simplify import simplify

from .programs import Program, bits, copy_module, equal_bits, feeds_of, programs, run

aten = torch.ops.aten


def count(module: GraphModule) -> int:
    return sum(node.op == "call_function" for node in module.graph.nodes)


def simplified(function: Callable[..., Any], *inputs: Tensor) -> tuple[GraphModule, int]:
    """The function as a simplified graph, and the number of nodes that it had before. Checks that the bits agree."""
    module = make_fx(function, tracing_mode="fake")(*inputs)
    before = count(module)
    expected = module(*inputs)
    simplify(module.graph)
    module.graph.lint()
    module.recompile()
    found = module(*inputs)
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple | list) else [(found, expected)]
    assert all(bits(a) == bits(b) and a.shape == b.shape for a, b in pairs)
    return module, before


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))

SHORTER: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "double transpose": (lambda x: x.t().t() + 1, 1),
    "four transposes": (lambda x: x.t().t().t().t() + 1, 1),
    "view to the same shape": (lambda x: aten.view(x, [4, 6]) + 1, 1),
    "view of a view": (lambda x: aten.view(aten.view(x, [2, 12]), [3, 8]) + 1, 2),
    "view there and back": (lambda x: aten.view(aten.view(x, [24]), [4, 6]) + 1, 1),
    "reshape there and back": (lambda x: aten.reshape(aten.view(x, [24]), [4, 6]) + 1, 1),
    "expand to the same shape": (lambda x: aten.expand(x, [4, 6]) + 1, 1),
    "same expression": (lambda x: (x * 2) + (x * 2), 2),
    "same chain": (lambda x: (x * 2).sin() + (x * 2).sin(), 3),
    "unused": (lambda x: (x.cos(), x.sin())[1], 1),
    "copy onto unused memory": (lambda x: aten.copy(torch.zeros_like(x), x * 2), 1),
}


@pytest.mark.parametrize("name", SHORTER)
def test_superfluous_nodes_go(name: str) -> None:
    function, left = SHORTER[name]
    module, before = simplified(function, X)
    assert count(module) == left < before


LONGER: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "one transpose": (lambda x: x.t() + 1, 2),
    "view to another shape": (lambda x: aten.view(x, [6, 4]) + 1, 2),
    "expand to a larger shape": (lambda x: aten.expand(x[:1], [4, 6]) + 1, 3),
    "copy to another dtype": (lambda x: aten.copy(torch.zeros(4, 6, dtype=torch.float64), x) + 1, 3),
    "int, float and bool": (lambda x: (aten.mul(x, 1), aten.mul(x, 1.0), aten.mul(x, True)), 3),
    "another keyword": (lambda x: (aten.add(x, x), aten.add(x, x, alpha=2)), 2),
    "another axis": (lambda x: (x.sum(0), x.sum(1)), 2),
    "arguments in another order": (lambda x: (x - x.sin(), x.sin() - x), 3),
}


@pytest.mark.parametrize("name", LONGER)
def test_what_only_looks_superfluous_stays(name: str) -> None:
    function, left = LONGER[name]
    assert count(simplified(function, X)[0]) == left


@st.composite
def factorings(draw: st.DrawFn, size: int) -> list[int]:
    """A random shape of `size` elements."""
    shape: list[int] = []
    rest = size
    while rest > 1 and len(shape) < 4:
        divisors = [d for d in range(1, rest + 1) if rest % d == 0]
        shape.append(draw(st.sampled_from(divisors)))
        rest //= shape[-1]
    return [*shape, rest]


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_views_of_views_of_any_strides_stay_right(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([12, 24, 36]))
    shape = data.draw(factorings(size))
    order = data.draw(st.permutations(range(len(shape))))
    wide = [*shape[:-1], shape[-1] + data.draw(st.integers(0, 2))]
    x = torch.arange(float(math.prod(wide))).reshape(wide)[..., : shape[-1]].permute(order)
    shapes = data.draw(st.lists(factorings(size), min_size=2, max_size=4))

    def function(t: Tensor) -> Tensor:
        for target in shapes:
            t = aten.view(t, target)
        return t * 2

    try:
        function(x)
    except RuntimeError:
        assume(False)  # strides that cannot be viewed so
    module, _ = simplified(function, x)
    assert count(module) <= 2


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(program=programs)
def test_any_recorded_program_keeps_its_bits_and_shrinks(program: Program) -> None:
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(4, 4, dtype=torch.float64, generator=generator) for _ in range(3)]
    module, before = simplified(lambda *xs: tuple(program.values(*xs)), *inputs)
    assert count(module) <= before
    once = module.code
    simplify(module.graph)
    module.recompile()
    assert module.code == once, "a second time finds nothing more"


def with_noise(graph: Graph, choices: list[tuple[int, str]]) -> Graph:
    """A copy of the graph in which the users of some nodes read an equal value, made in a roundabout way."""
    module, _ = copy_module(graph.module)
    for position, kind in choices:
        nodes = [n for n in module.graph.nodes if n.op == "call_function" and isinstance(n.meta["val"], Tensor)]
        _take_detour(module.graph, nodes[position % len(nodes)], kind)
    module.recompile()
    return graph.with_(module=module)


def outputs_of(graph: torch.fx.Graph) -> list[str]:
    (output,) = graph.find_nodes(op="output")
    return [node.name for node in tree_leaves(output.args)]


def _take_detour(graph: torch.fx.Graph, node: Node, kind: str) -> None:
    value, users = node.meta["val"], [user for user in node.users if user.op != "output"]
    with graph.inserting_after(node):
        if kind == "copy":
            new = graph.node_copy(node)
        elif kind == "transpose" and value.dim() == 2:
            first = graph.call_function(aten.t.default, (node,))
            first.meta = {**node.meta, "val": value.t()}
            with graph.inserting_after(first):
                new = graph.call_function(aten.t.default, (first,))
        else:
            new = graph.call_function(aten.expand.default, (node, list(value.shape)))
    new.meta = dict(node.meta)
    for user in users:
        user.replace_input_with(node, new)


@settings(deadline=None, max_examples=10, suppress_health_check=list(HealthCheck))
@given(
    program=programs,
    choices=st.lists(st.tuples(st.integers(0, 99), st.sampled_from(["copy", "transpose", "expand"])), max_size=6),
)
@example(program=Program((("add", 0, 0), ("transpose", 3, 0)), 0, 0), choices=[(0, "transpose")])
def test_noise_in_a_whole_step_is_removed(program: Program, choices: list[tuple[int, str]]) -> None:
    graph = program.graph()
    noisy = check(with_noise(graph, choices))
    feeds = feeds_of(graph)
    expected = run(graph, graph.initial, feeds)
    assert equal_bits(run(noisy, graph.initial, feeds), expected)
    module, _ = copy_module(noisy.module)
    before = outputs_of(module.graph)
    simplify(module.graph)
    module.recompile()
    # What is given out may be another node now, that computes the same earlier; names are given after simplifying.
    name = dict(zip(before, outputs_of(module.graph), strict=True))
    fetches = {key: name[node] for key, node in noisy.fetches.items()}
    updates = {key: name[node] for key, node in noisy.updates.items()}
    clean = check(noisy.with_(module=module, fetches=fetches, updates=updates))
    assert len(clean.nodes) <= len(graph.nodes)
    assert equal_bits(run(clean, graph.initial, feeds), expected)
