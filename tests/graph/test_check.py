"""Every invariant that check.py lists, broken on purpose and found."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from millrace.errors import GraphError
from millrace.graph.check import check
from millrace.graph.graph import INFO, Graph, set_output
from millrace.graph.signature import Feed, TensorSpec
from millrace.graph.trace import trace

from .programs import branch_graph, copy_module, deep_graph, mlp_graph

aten = torch.ops.aten


@pytest.mark.parametrize("make", [mlp_graph, deep_graph, branch_graph])
def test_sound_graphs_pass(make: Callable[[], Graph]) -> None:
    assert check(make()) is make()


def broken(change: Callable[[dict[str, Node]], Any], **fields: Any) -> Graph:
    """A copy of the graph of a small MLP whose nodes `change` has spoilt, by their names."""
    graph = mlp_graph()
    module, mapping = copy_module(graph.module)
    nodes = {old.name: new for old, new in mapping.items()}
    nodes["output"] = next(iter(module.graph.find_nodes(op="output")))
    change(nodes)
    return graph.with_(module=module, **fields)


def untouched(_: dict[str, Node]) -> None:
    pass


def complaint(graph: Graph) -> str:
    with pytest.raises(GraphError) as caught:
        check(graph)
    return str(caught.value)


# 1. inputs


def test_inputs_must_be_as_many_as_the_signature_says() -> None:
    assert "7 placeholders for 6 variables and feeds" in complaint(
        broken(untouched, variables=mlp_graph().variables[1:])
    )


@pytest.mark.parametrize("spec", [TensorSpec((5, 9), torch.float32), TensorSpec((5, 4), torch.float64)])
def test_inputs_must_have_the_signatures_shape_and_dtype(spec: TensorSpec) -> None:
    assert "input 'x' is" in complaint(broken(untouched, feeds=(Feed("x", spec), mlp_graph().feeds[1])))


def test_inputs_must_stand_in_the_signatures_order() -> None:
    first, second, *others = mlp_graph().variables
    found = complaint(broken(untouched, variables=(second, first, *others)))
    assert "input '0.bias' is f32[3] in the signature but f32[3, 4]" in found


def test_inputs_must_stand_before_the_computation() -> None:
    feed = mlp_graph().placeholders()["feed:y"].name

    def late(nodes: dict[str, Node]) -> None:
        nodes["pow_1"].append(nodes[feed])

    found = complaint(broken(late))
    assert f"placeholder {feed} stands after a computing node" in found
    assert f"sub uses {feed}, which does not stand before it" in found


# 2. targets


@pytest.mark.parametrize("target", [torch.relu, operator.mul, torch.nn.functional.relu, len])
def test_functions_that_are_no_operators_are_found(target: Callable[..., Any]) -> None:
    assert "which is not an operator" in complaint(broken(lambda n: setattr(n["relu"], "target", target)))


@pytest.mark.parametrize(("op", "target"), [("call_method", "relu"), ("call_module", "inner")])
def test_other_kinds_of_node_are_found(op: str, target: str) -> None:
    def change(nodes: dict[str, Node]) -> None:
        nodes["relu"].op, nodes["relu"].target = op, target

    assert f"relu is a {op} node" in complaint(broken(change))


def test_constants_must_be_held_by_the_module() -> None:
    def change(nodes: dict[str, Node]) -> None:
        with nodes["t"].graph.inserting_before(nodes["t"]):
            node = nodes["t"].graph.create_node("get_attr", "lost.weight")
        nodes["relu"].args = (node,)

    assert "'lost.weight', which is neither a tensor nor a subgraph" in complaint(broken(change))


# 3. order


def test_arguments_must_stand_before_their_users() -> None:
    def change(nodes: dict[str, Node]) -> None:
        nodes["mean"].append(nodes["addmm"])

    assert "relu uses addmm, which does not stand before it" in complaint(broken(change))


def test_arguments_must_belong_to_the_graph() -> None:
    foreign = next(n for n in mlp_graph().fx.nodes if n.name == "addmm")
    assert "relu uses addmm" in complaint(broken(lambda n: setattr(n["relu"], "args", (foreign,))))


# 4. purity


@pytest.mark.parametrize("target", [aten.relu_.default, aten.dropout_.default, aten.copy_.default])
def test_mutation_is_found(target: Any) -> None:
    assert f"relu mutates: {target}" in complaint(broken(lambda n: setattr(n["relu"], "target", target)))


@pytest.mark.parametrize("target", [aten.bernoulli.default, aten.rand_like.default, aten.native_dropout.default])
def test_hidden_randomness_is_found(target: Any) -> None:
    found = complaint(broken(lambda n: setattr(n["relu"], "target", target)))
    assert f"relu draws from a hidden generator: {target}" in found


def test_attention_is_random_with_dropout_only() -> None:
    def step(_: Any, x: Tensor) -> dict[str, Tensor]:
        return {"y": torch.nn.functional.scaled_dot_product_attention(x, x, x)}

    graph = trace(step, {}, torch.randn(1, 2, 4, 8))
    attention = next(n for n in graph.nodes if "attention" in str(n.target))
    assert check(graph) is graph
    module, mapping = copy_module(graph.module)
    mapping[attention].args = (*attention.args[:3], 0.5)
    assert "draws from a hidden generator" in complaint(graph.with_(module=module))


# 5. what is known of a node


@pytest.mark.parametrize(("key", "missing"), [(INFO, "NodeInfo"), ("val", "shape and dtype")])
def test_every_node_must_say_where_it_comes_from_and_what_it_is(key: str, missing: str) -> None:
    assert f"relu has no {missing}" in complaint(broken(lambda n: n["relu"].meta.pop(key)))


# 6. the output


def test_output_must_list_fetches_and_then_updates() -> None:
    def swap(nodes: dict[str, Node]) -> None:
        results = nodes["output"].args[0]
        set_output(nodes["relu"].graph, [*results[1:], results[0]])  # type: ignore[index, misc]

    assert "the output lists" in complaint(broken(swap))
    assert "the output lists" in complaint(broken(untouched, fetches={**mlp_graph().fetches, "more": "relu"}))
    assert "the output lists" in complaint(broken(untouched, updates={}))
    assert "the output lists" in complaint(broken(untouched, fetches={"loss": "nobody"}))


def test_there_must_be_one_output() -> None:
    def drop(nodes: dict[str, Node]) -> None:
        nodes["output"].graph.erase_node(nodes["output"])

    assert "0 output nodes" in complaint(broken(drop))


def test_fetches_must_be_tensors() -> None:
    graph = deep_graph()
    whole = next(n for n in graph.nodes if isinstance(n.meta["val"], tuple | list))
    module, mapping = copy_module(graph.module)
    updates = [mapping[graph.node(name)] for name in graph.updates.values()]
    set_output(module.graph, [mapping[whole], *updates])
    assert f"fetch 'norm' ({whole.name}) is not a tensor" in complaint(
        graph.with_(module=module, fetches={"norm": whole.name})
    )


# 7. updates


def test_updates_must_name_variables() -> None:
    renamed = {("nobody" if name == "2.bias" else name): node for name, node in mlp_graph().updates.items()}
    assert "updates 'nobody', which is no variable" in complaint(broken(untouched, updates=renamed))


@pytest.mark.parametrize("spec", [TensorSpec((3, 5), torch.float32), TensorSpec((3, 4), torch.float64)])
def test_updates_must_keep_the_shape_and_dtype(spec: TensorSpec) -> None:
    update = mlp_graph().updates["0.weight"]

    def change(nodes: dict[str, Node]) -> None:
        node = nodes[update]
        with node.meta["val"].fake_mode:
            node.meta["val"] = torch.empty(spec.shape, dtype=spec.dtype)

    assert f"variable '0.weight' is f32[3, 4], its update {update} is {spec}" in complaint(broken(change))


# 8. names


def test_names_must_be_unique() -> None:
    first, second, *others = mlp_graph().variables
    twice = (first, replace(second, name="0.weight"), *others)
    assert "2 variables are called '0.weight'" in complaint(broken(untouched, variables=twice))
    x, y = mlp_graph().feeds
    feeds = (x, replace(y, name="x"))
    assert "2 feeds are called 'x'" in complaint(broken(untouched, feeds=feeds))
    assert "2 nodes are called 'relu'" in complaint(broken(lambda n: setattr(n["t"], "name", "relu")))


def test_all_problems_are_counted_and_twenty_are_listed() -> None:
    def spoil(nodes: dict[str, Node]) -> None:
        for node in nodes.values():
            node.meta.pop(INFO, None)

    found = complaint(broken(spoil))
    count = len(mlp_graph().nodes)
    assert found.startswith(f"{count} broken invariant(s)")
    assert len(found.splitlines()) == 21
