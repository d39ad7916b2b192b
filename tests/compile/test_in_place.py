"""Updates in the variables' own memory give, bit for bit, what the functional graph says, whatever else reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.small import cross_entropy, labelled, mlp
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import Interpreter

from millrace.compile.eager import compile_eager
from millrace.compile.in_place import assigned, in_place
from millrace.graph.check import check
from millrace.graph.graph import Graph
from millrace.graph.passes.prune import prune
from millrace.graph.passes.sparse_rows import sparse_rows
from millrace.graph.passes.splitting.split import split
from millrace.graph.passes.unroll import unroll
from millrace.graph.trace import trace
from millrace.graph.training import training_graph

SIDE = 3
NAMES = ("a", "b", "c")
Binary = Callable[[Tensor, Tensor], Tensor]

# What optimizers are made of, what looks at memory without owning it, and what makes new memory.
OPERATORS: dict[str, Binary] = {
    "add": lambda x, y: x + y,
    "subtract scaled": lambda x, y: torch.sub(x, y, alpha=0.25),
    "multiply": lambda x, y: x * y,
    "divide": lambda x, y: x / (y * y + 1),
    "addcmul": lambda x, y: torch.addcmul(x, y, y, value=0.5),
    "addcdiv": lambda x, y: torch.addcdiv(x, y, y * y + 1, value=-0.5),
    "lerp": lambda x, y: torch.lerp(x, y, 0.1),
    "lerp by a tensor": lambda x, y: torch.lerp(x, y, y.sigmoid()),
    "clamp": lambda x, _: x.clamp(-1, 1),
    "rows": lambda x, y: torch.index_put(x, [torch.tensor([0, 2, 0])], y, accumulate=True),
    "transpose": lambda x, _: x.t(),
    "view": lambda x, _: x.reshape(SIDE * SIDE).view(SIDE, SIDE),
    "row": lambda x, _: x[1:2].expand(SIDE, SIDE),
    "split": lambda x, y: torch.cat([x.split(1)[0], y[1:]]),
    "matmul": lambda x, y: x @ y / SIDE,
    "product added": lambda x, y: torch.addmm(x, y, y.cos(), alpha=0.5),
    "norm": lambda x, y: torch.layer_norm(x + y, [SIDE]),
    "parts of a sum": lambda x, y: (x.sin() + y) / 2 - x.cos(),
    "same": lambda x, _: x,
}


@dataclass(frozen=True)
class Steps:
    """Operators on earlier values, by number; then which values the variables become and which are fetched."""

    operators: tuple[tuple[str, int, int], ...]
    updates: tuple[int, int, int]
    updated: tuple[bool, bool, bool]
    fetched: tuple[int, ...]
    late: bool

    def graph(self) -> Graph:
        tensors = {name: torch.zeros(SIDE, SIDE, dtype=torch.float64) for name in NAMES}
        return trace(self.step, tensors, torch.zeros(SIDE, SIDE, dtype=torch.float64))

    def step(self, v: dict[str, Any], x: Tensor) -> dict[str, Tensor]:
        values = [v["a"], v["b"], v["c"], x]
        for name, left, right in self.operators:
            values.append(OPERATORS[name](values[left % len(values)], values[right % len(values)]))
        for name, number, updated in zip(NAMES, self.updates, self.updated, strict=True):
            if updated:
                v[name] = values[number % len(values)]
        # Read after everything else: what an update in place must not have touched.
        late = {"late": values[0] * 2 + values[1].t() * 3 + values[2]} if self.late else {}
        return {f"fetch{i}": values[number % len(values)] for i, number in enumerate(self.fetched)} | late


NUMBER = st.one_of(st.integers(0, 2), st.just(-1), st.integers(0, 12))  # a variable, the latest value, any
STEPS = st.builds(
    Steps,
    st.lists(st.tuples(st.sampled_from(sorted(OPERATORS)), NUMBER, NUMBER), min_size=1, max_size=7).map(tuple),
    st.tuples(NUMBER, NUMBER, NUMBER),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.lists(NUMBER, max_size=3).map(tuple),
    st.booleans(),
)


def functional(
    graph: Graph, variables: Mapping[str, Tensor], feeds: list[Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What the graph says: its fetches, and the variables after it, with nothing overwritten."""
    inputs = [variables[v.name].clone() for v in graph.variables]
    results = [r.clone() for r in Interpreter(graph.module).run(*inputs, *feeds)]
    fetches = results[: len(graph.fetches)]
    return fetches, {**variables, **dict(zip(graph.updates, results[len(graph.fetches) :], strict=True))}


def start(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(SIDE, SIDE, generator=generator, dtype=torch.float64) for name in NAMES}


@given(program=STEPS, unrolled=st.booleans())
@settings(max_examples=100, deadline=None)
def test_in_place_is_functional_bit_for_bit(program: Steps, unrolled: bool) -> None:
    graph = check(program.graph())
    if unrolled:
        graph = unroll(graph, 2)
    for make in (in_place, assigned):
        expected, live = start(), start()
        addresses = {name: tensor.data_ptr() for name, tensor in live.items()}
        module = make(graph)
        for step in range(2):
            generator = torch.Generator().manual_seed(step)
            feeds = [torch.randn(SIDE, SIDE, generator=generator, dtype=torch.float64) for _ in graph.feeds]
            fed = [feed.clone() for feed in feeds]
            fetches, expected = functional(graph, expected, feeds)
            found = module(*(live[v.name] for v in graph.variables), *fed)
            kept = [value.clone() for value in found]
            assert all(torch.equal(a, b) for a, b in zip(fetches, found, strict=True))
            assert all(torch.equal(live[name], expected[name]) for name in live), graph
            assert all(torch.equal(a, b) for a, b in zip(fed, feeds, strict=True))
            # What was fetched is the caller's own: neither reaches the other.
            for value in live.values():
                value.add_(1)
            assert all(torch.equal(a, b) for a, b in zip(kept, found, strict=True))
            for value in live.values():
                value.sub_(1)
            expected = {name: value.clone() for name, value in live.items()}
        assert {name: tensor.data_ptr() for name, tensor in live.items()} == addresses


@given(program=STEPS)
@settings(max_examples=40, deadline=None)
def test_what_is_fetched_shares_memory_with_no_input(program: Steps) -> None:
    graph = program.graph()
    live, feed = start(), torch.ones(SIDE, SIDE, dtype=torch.float64)
    found = compile_eager(graph)([live[v.name] for v in graph.variables], [feed])
    inputs = {t.untyped_storage().data_ptr() for t in (*live.values(), feed)}
    assert not inputs & {value.untyped_storage().data_ptr() for value in found}


def test_swapped_variables_are_saved_from_each_other() -> None:
    def step(v: dict[str, Any], x: Tensor) -> Tensor:
        v["a"], v["b"] = v["b"], v["a"] + x
        return x.sum()

    graph = trace(step, {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}, torch.tensor([10.0]))
    variables = [torch.tensor([1.0]), torch.tensor([2.0])]
    compile_eager(graph)(variables, [torch.tensor([10.0])])
    assert [v.item() for v in variables] == [2.0, 11.0]


def test_an_index_that_is_the_table_itself() -> None:
    def step(v: dict[str, Any], x: Tensor) -> Tensor:
        v["i"] = torch.index_put(v["i"], [v["i"]], x)
        return x.sum()

    graph = trace(step, {"i": torch.tensor([2, 0, 1])}, torch.tensor([0, 1, 2]))
    table = torch.tensor([2, 0, 1])
    compile_eager(graph)([table], [torch.tensor([0, 1, 2])])
    assert table.tolist() == [1, 2, 0]


def test_a_constant_of_the_graph_stays_what_it_is() -> None:
    def step(v: dict[str, Any], x: Tensor) -> dict[str, Tensor]:
        c = torch.tensor([1.0, 2.0, 3.0])
        return {"constant": c, "view": c.view(3, 1), "sum": (c * x).sum() + v["w"]}

    run = compile_eager(trace(step, {"w": torch.tensor(0.0)}, torch.ones(3)))
    for _ in range(2):
        constant, view, total = run([torch.tensor(0.0)], [torch.ones(3)])
        assert total.item() == 6.0
        constant.zero_()
        view.zero_()


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1),
    ],
    ids=["sgd", "momentum", "adamw"],
)
def test_no_optimizer_copies_its_parameters(optimizer: Any) -> None:
    model = mlp()
    graph = training_graph(model, cross_entropy, optimizer(model.parameters()), labelled())
    graph = sparse_rows(prune(graph, ["loss"], graph.updates))
    parameters = [v for v in graph.variables if v.spec.shape and v.name in graph.updates]
    # Of the 0-dimensional counters some are copied: those that are read after their update began.
    written = [
        node.target
        for node in in_place(graph).graph.nodes
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable and node.meta["val"].ndim
    ]
    assert torch.ops.aten.copy_.default not in written
    assert len(written) >= len(parameters)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_step_takes_no_memory_of_the_parameters_size(steps: int) -> None:
    side = 256
    model = nn.Linear(side, side, bias=False)
    batch = (torch.randn(2, side), torch.randint(0, side, (2,)))
    graph = training_graph(model, cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1), batch)
    graph = prune(graph, ["loss"], graph.updates)
    whole = unroll(graph, steps) if steps > 1 else graph
    run = compile_eager(whole)
    variables = [t.detach() for t in graph.initial.values()]
    feeds = list(batch) * steps
    peak = peak_bytes(lambda: run(variables, feeds))
    parameters_bytes = side * side * 4
    # The gradient, and the gradient times the learning rate; no third one for a new parameter.
    assert peak < 2.5 * parameters_bytes


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that PyTorch held at once for `call`, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    now = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def test_a_value_that_is_read_again_is_not_written_over() -> None:
    """The gradient is clipped by a norm that reads it too; it is fetched; and its double is read through a view."""

    def step(v: dict[str, Any], x: Tensor) -> dict[str, Tensor]:
        gradient = torch.addmm(x * 2, x, x)
        clipped = gradient / (gradient.norm() + 1)
        double = gradient + gradient
        turned = double.t()
        v["w"] = v["w"] - clipped
        return {"gradient": gradient, "turned": turned * 1.0, "less": double - 1, "sum": clipped + 1}

    x = torch.arange(9.0).view(3, 3)
    found = compile_eager(trace(step, {"w": torch.zeros(3, 3)}, x))([w := torch.zeros(3, 3)], [x.clone()])
    expected = step(variables := {"w": torch.zeros(3, 3)}, x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected.values(), strict=True))
    assert torch.equal(w, variables["w"])


def test_a_value_read_once_is_written_over() -> None:
    def step(v: dict[str, Any], x: Tensor) -> Tensor:
        return torch.addmm((x * 2 + v["w"]).sqrt() / 3, x, x)

    graph = trace(step, {"w": torch.zeros(3, 3)}, torch.ones(3, 3))
    written = [n.target for n in in_place(graph).graph.nodes if n.op == "call_function" and "_." in str(n.target)]
    assert written == [torch.ops.aten.add_.Tensor, torch.ops.aten.div_.Tensor, torch.ops.aten.addmm_.default]
    # One that lies otherwise than the result keeps its own memory: a later view may rest on how the result lies.
    x = torch.arange(9.0).view(3, 3)
    turned = trace(lambda _, x: torch.addmm(x.t() * 2, x, x).view(9), {}, x)
    assert torch.equal(compile_eager(turned)([], [x])[0], (x.t() * 2 + x @ x).reshape(9))


def test_a_feed_is_written_over_only_where_the_caller_gives_its_memory() -> None:
    graph = trace(lambda v, x: (x + v["w"]) * 2, {"w": torch.ones(3)}, torch.zeros(3))
    kept, given = torch.zeros(3), torch.zeros(3)
    (first,) = compile_eager(graph)([torch.ones(3)], [kept])
    (second,) = compile_eager(graph, [graph.feeds[0].name])([torch.ones(3)], [given])
    assert torch.equal(first, second)
    assert torch.equal(kept, torch.zeros(3))
    assert second.data_ptr() == given.data_ptr()


@pytest.mark.parametrize("strided", ["transposed", "every other", "channels last", "empty"])
def test_variables_of_any_layout_keep_it(strided: str) -> None:
    made = {
        "transposed": lambda: torch.arange(12.0).view(3, 4).t(),
        "every other": lambda: torch.arange(12.0).view(6, 2)[::2],
        "channels last": lambda: torch.arange(16.0).view(1, 4, 2, 2).to(memory_format=torch.channels_last),
        "empty": lambda: torch.empty(0, 3),
    }[strided]
    variable = made()

    def step(v: dict[str, Any], x: Tensor) -> Tensor:
        v["w"] = v["w"] * 2 - x
        return v["w"].sum()

    graph = trace(step, {"w": variable}, torch.tensor(1.0))
    address, stride = variable.data_ptr(), variable.stride()
    found = compile_eager(graph)([variable], [torch.tensor(1.0)])
    assert torch.equal(variable, made() * 2 - 1)
    assert (variable.data_ptr(), variable.stride()) == (address, stride)
    assert found[0].item() == (made() * 2 - 1).sum().item()


def test_sums_over_blocks_grow_by_their_products_in_one_operator() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    graph = training_graph(model, cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1), labelled())
    blocks = split(graph, 4, min_width=8)
    made = in_place(blocks)
    sums = [node for node in made.graph.nodes if node.target is torch.ops.aten.addmm_.default]
    assert len(sums) == 2 * 3  # of the gradients of both tanh: three more blocks are added to the first
    fetches, variables = functional(blocks, blocks.initial, list(labelled()))
    live = {name: tensor.detach().clone() for name, tensor in blocks.initial.items()}
    found = compile_eager(blocks)([live[v.name] for v in blocks.variables], list(labelled()))
    torch.testing.assert_close(found, fetches, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(live, variables, rtol=1e-12, atol=1e-14)


def test_other_sums_of_products_keep_their_bits() -> None:
    graph = trace(lambda _, x: x @ x + x @ x.t(), {}, torch.randn(3, 3))
    assert torch.ops.aten.addmm_.default not in [node.target for node in in_place(graph).graph.nodes]
