"""Pruned graphs compute the same numbers with no more nodes than these need."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from millrace.compile.eager import compile_eager
from millrace.errors import FetchError
from millrace.graph.check import check
from millrace.graph.graph import Graph, spec_of
from millrace.graph.passes.prune import prune, resolve

from .programs import Program, branch_graph, deep_graph, equal_bits, feeds_of, mlp_graph, programs, run


class Counter(TorchDispatchMode):
    """Counts the operators that run."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operators_run(graph: Graph, initial: dict[str, Tensor]) -> int:
    variables = [initial[v.name].detach().clone() for v in graph.variables]
    compiled, feeds = compile_eager(graph), feeds_of(graph)
    with Counter() as counter:
        compiled(variables, feeds)
    return counter.count


def needed(graph: Graph, results: list[str]) -> set[str]:
    """The names of the computing nodes that some nodes depend on, and their own."""
    found: set[str] = set()
    waiting = [graph.node(name) for name in results]
    while waiting:
        node = waiting.pop()
        if node.name not in found:
            found.add(node.name)
            waiting += node.all_input_nodes
    return found & {n.name for n in graph.nodes}


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(program=programs, data=st.data())
def test_any_part_of_a_program_computes_what_the_whole_does(program: Program, data: st.DataObject) -> None:
    graph = program.graph()
    fetches = data.draw(st.lists(st.sampled_from(sorted(graph.fetches)), unique=True))
    updates = data.draw(st.lists(st.sampled_from(sorted(graph.updates)), unique=True))
    part = check(prune(graph, fetches, updates))
    assert {n.name for n in part.nodes} == needed(
        graph, [graph.fetches[f] for f in fetches] + [graph.updates[u] for u in updates]
    )
    feeds = feeds_of(graph)
    whole, some = run(graph, graph.initial, feeds, steps=1), run(part, graph.initial, feeds, steps=1)
    fetched = dict(zip(graph.fetches, whole, strict=False))
    assert equal_bits(some[: len(fetches)], [fetched[f] for f in fetches])
    after = dict(zip([v.name for v in graph.variables], whole[len(fetched) :], strict=True))
    expected = [after[v.name] if v.name in updates else graph.initial[v.name].detach() for v in graph.variables]
    assert equal_bits(some[len(fetches) :], expected)


@pytest.mark.parametrize("make", [mlp_graph, branch_graph])
def test_every_node_can_be_fetched_by_its_name(make: Any) -> None:
    graph = make()
    feeds = feeds_of(graph)
    inputs = [*(graph.initial[v.name].detach() for v in graph.variables), *feeds]
    values: dict[str, Any] = {}

    class Noting(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            values[n.name] = super().run_node(n)
            return values[n.name]

    Noting(graph.module).run(*inputs)
    for node in graph.nodes:
        if spec_of(node) is not None:
            part = check(prune(graph, [node.name], []))
            assert equal_bits(run(part, graph.initial, feeds, steps=1)[:1], [values[node.name]])


def test_an_intermediate_runs_fewer_operators_and_no_update() -> None:
    graph = deep_graph()
    initial = dict(graph.initial)
    counts = [
        operators_run(prune(graph, fetches, updates), initial)
        for fetches, updates in (
            (["addmm"], []),
            (["addmm_1"], []),
            (["loss"], []),
            (["loss"], ["head.bias"]),
            (["loss"], list(graph.updates)),
        )
    ]
    assert counts == sorted(set(counts)), "every next one needs more"
    assert counts[0] == 2  # the transposed weight, and the product
    part = prune(graph, ["loss"], [])
    assert not {n.meta["millrace"].phase for n in part.nodes} & {"backward", "update"}


def test_inputs_stay_so_that_a_part_is_called_like_the_whole() -> None:
    graph = mlp_graph()
    part = prune(graph, ["relu"], [])
    assert list(part.placeholders()) == list(graph.placeholders())
    assert len(part.nodes) == 3


def test_a_variable_is_fetched_as_it_was_before_the_update() -> None:
    graph = mlp_graph()
    part = check(prune(graph, ["0.weight"], ["0.weight"]))
    before, *after = run(part, graph.initial, feeds_of(graph), steps=1)
    assert torch.equal(before, graph.initial["0.weight"])
    assert not torch.equal(after[0], before)


def test_a_new_value_can_be_fetched_beside_its_update() -> None:
    graph = mlp_graph()
    part = check(prune(graph, [graph.updates["0.weight"]], ["0.weight"]))
    fetched, *variables = run(part, graph.initial, feeds_of(graph), steps=1)
    assert torch.equal(fetched, variables[0])


def test_the_whole_graph_is_not_changed_by_pruning() -> None:
    graph = mlp_graph()
    before = graph.module.code
    prune(graph, [], [])
    assert graph.module.code == before


@pytest.mark.parametrize(("wrong", "right"), [("los", "'loss'"), ("0.weigth", "'0.weight'"), ("addm", "'addmm'")])
def test_unknown_fetches_suggest_the_near_ones(wrong: str, right: str) -> None:
    with pytest.raises(FetchError, match="Did you mean") as caught:
        prune(mlp_graph(), [wrong], [])
    assert right in str(caught.value)


def test_names_mean_fetches_first_then_variables_then_nodes() -> None:
    graph = mlp_graph().with_(fetches={"relu": mlp_graph().fetches["loss"]})
    assert resolve(graph, "relu") == mlp_graph().fetches["loss"]
    assert resolve(graph, "0.weight") == graph.placeholders()["0.weight"].name
    assert resolve(graph, "addmm") == "addmm"
