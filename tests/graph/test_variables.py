"""What the variables of a step are called, and which module, phase and variable every node is labelled with."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millrace import optim
from millrace.graph.graph import Graph, info
from millrace.graph.signature import Phase, Role, TensorSpec
from millrace.graph.trace import trace
from millrace.graph.training import evaluation_graph, training_graph

aten = torch.ops.aten


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x)).tanh()


class Net(nn.Module):
    """Modules in modules; the table is used twice (tied), once by the root itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.stats = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.stats(x))


TOKENS = torch.tensor([1, 2, 5, 0, 3])


def cross_entropy(model: Any, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens), tokens.roll(1))


@functools.cache
def graph_of(make: Any = lambda m: torch.optim.AdamW(m.parameters())) -> Graph:
    model = Net()
    return training_graph(model, cross_entropy, make(model), TOKENS)


PARAMETERS = [
    "table.weight",
    *(f"blocks.{i}.{name}" for i in range(2) for name in ("norm.weight", "norm.bias", "inner.weight", "inner.bias")),
    "stats.weight",
    "stats.bias",
]


def named(graph: Graph, role: Role) -> list[str]:
    return [v.name for v in graph.variables if v.role is role]


# Variables.


def test_parameters_and_buffers_have_the_modules_own_names_and_tied_ones_the_first() -> None:
    graph = graph_of()
    assert named(graph, Role.PARAMETER) == PARAMETERS
    assert named(graph, Role.BUFFER) == ["stats.running_mean", "stats.running_var", "stats.num_batches_tracked"]
    assert named(graph, Role.STEP) == ["step"]
    assert named(graph, Role.RANDOM) == []


@pytest.mark.parametrize(
    "make",
    [lambda m: torch.optim.AdamW(m.parameters()), lambda m: optim.adamw(1e-3)],
    ids=["torch.optim", "millrace.optim"],
)
def test_optimizer_slots_are_named_and_owned_by_their_parameter(make: Any) -> None:
    graph = graph_of(make)
    slots = {v.name: v for v in graph.variables if v.role is Role.OPTIMIZER}
    for parameter in PARAMETERS:
        own = [v for v in slots.values() if v.owner == parameter and v.spec == graph.variable(parameter).spec]
        assert len(own) == 2, f"first and second moment of {parameter}"
        assert all(v.name.startswith(f"optimizer/{parameter}/") for v in own)


def test_groups_have_their_own_rates() -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        first, *rest = model.parameters()
        return torch.optim.SGD([{"params": [first], "lr": 0.5}, {"params": rest}], lr=0.1)

    graph = graph_of(make)
    assert named(graph, Role.OPTIMIZER) == ["optimizer/group0/lr", "optimizer/group1/lr"]
    assert [graph.initial[f"optimizer/group{i}/lr"].item() for i in range(2)] == [0.5, 0.1]


def test_every_variable_is_of_its_tensors_shape_and_dtype_and_is_that_tensor() -> None:
    model = Net()
    graph = training_graph(model, cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1), TOKENS)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in own.items():
        assert graph.initial[name] is tensor
        assert graph.variable(name).spec == TensorSpec.of(tensor)


def test_prefixes_keep_two_modules_and_a_tensor_apart() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.bias = first.bias  # shared between modules: one variable, under its first name
    given = {"a": first, "b": second, "w": torch.zeros(4)}
    graph = trace(lambda v, x: v["b"](v["a"](x)) * v["w"], given, torch.ones(2, 4))
    assert [v.name for v in graph.variables] == ["a.weight", "a.bias", "b.weight", "w"]
    assert [v.role for v in graph.variables] == [Role.PARAMETER] * 3 + [Role.TENSOR]


def test_frozen_and_unused_parameters_are_not_updated() -> None:
    model = Net()
    model.blocks[0].inner.weight.requires_grad_(False)
    model.unused = nn.Linear(3, 3)
    graph = training_graph(model, cross_entropy, torch.optim.AdamW(model.parameters()), TOKENS)
    silent = {"blocks.0.inner.weight", "unused.weight", "unused.bias"}
    assert set(graph.updates).isdisjoint(silent)
    assert silent <= {v.name for v in graph.variables}
    assert set(PARAMETERS) - silent <= set(graph.updates)


# Labels.


def test_every_node_has_a_shape_a_phase_and_a_line() -> None:
    graph = graph_of()
    for node in graph.nodes:
        values = node.meta["val"] if isinstance(node.meta["val"], tuple | list) else [node.meta["val"]]
        assert all(value is None or isinstance(value, Tensor) for value in values)
        assert info(node).phase in Phase
    forward = [info(n) for n in graph.nodes if info(n).phase is Phase.FORWARD]
    assert all("test_variables.py:" in origin.line for origin in forward)


def test_values_have_the_shapes_and_dtypes_that_the_nodes_say() -> None:
    graph = graph_of()
    seen = []

    class Checking(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            value = super().run_node(node)
            if isinstance(value, Tensor) and node.op == "call_function":
                said = node.meta["val"]
                assert (value.shape, value.dtype, value.stride()) == (said.shape, said.dtype, said.stride()), node
                seen.append(node)
            return value

    with torch.no_grad():
        Checking(graph.module).run(*graph.initial.values(), TOKENS)
    assert len(seen) > 50


def scopes(graph: Graph, phase: Phase) -> set[str]:
    return {info(node).scope for node in graph.nodes if info(node).phase is phase}


MODULES = {"table", "stats", "head", *(f"blocks.{i}{part}" for i in range(2) for part in ("", ".norm", ".inner"))}


def test_forward_nodes_have_their_module() -> None:
    graph = graph_of()
    assert scopes(graph, Phase.FORWARD) == MODULES | {""}  # the loss stands in no module


def test_backward_nodes_have_the_module_of_their_forward_node() -> None:
    graph = graph_of()
    assert scopes(graph, Phase.BACKWARD) >= MODULES
    kinds = {
        aten.embedding_dense_backward.default: {"table"},
        aten.native_layer_norm_backward.default: {"blocks.0.norm", "blocks.1.norm"},
        aten.native_batch_norm_backward.default: {"stats"},
        aten.tanh_backward.default: {"blocks.0", "blocks.1"},
        aten._log_softmax_backward_data.default: {""},
    }
    for operator, expected in kinds.items():
        found = [info(node) for node in graph.nodes if node.target is operator]
        assert {origin.scope for origin in found} == expected
        assert {origin.phase for origin in found} == {Phase.BACKWARD}
    # The products with a weight: one for its input's gradient, one for its own.
    products = [info(n) for n in graph.nodes if n.target is aten.mm.default and info(n).phase is Phase.BACKWARD]
    assert {origin.scope for origin in products} == {"head", "blocks.0.inner", "blocks.1.inner"}


def test_backward_nodes_have_the_line_of_their_forward_node() -> None:
    graph = graph_of()
    forward = {info(n).line for n in graph.nodes if n.target is aten.tanh.default}
    backward = {info(n).line for n in graph.nodes if n.target is aten.tanh_backward.default}
    assert forward == backward
    assert len(forward) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda m: torch.optim.AdamW(m.parameters()),
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
        lambda m: optim.adamw(1e-3),
    ],
    ids=["AdamW", "SGD", "ours"],
)
def test_update_nodes_have_their_variable(make: Any) -> None:
    graph = graph_of(make)
    for variable, name in graph.updates.items():
        node = graph.node(name)
        owner = graph.variable(variable).owner
        if variable == "step" or (owner == variable and variable not in PARAMETERS):
            continue  # counters serve every parameter
        if info(node).phase is Phase.UPDATE:
            assert info(node).variable in (owner, "*"), variable
    owners = {info(n).variable for n in graph.nodes if info(n).phase is Phase.UPDATE}
    assert set(PARAMETERS) <= owners
    last = [graph.node(graph.updates[parameter]) for parameter in PARAMETERS]
    assert [info(node).phase for node in last] == [Phase.UPDATE] * len(PARAMETERS)
    assert [info(node).variable for node in last] == PARAMETERS


def test_running_statistics_are_updated_in_the_forward_phase_of_their_module() -> None:
    graph = graph_of()
    for name in ("stats.running_mean", "stats.running_var", "stats.num_batches_tracked"):
        origin = info(graph.node(graph.updates[name]))
        assert (origin.scope, origin.phase) == ("stats", Phase.FORWARD)


def test_a_loss_by_functional_call_keeps_the_modules() -> None:
    def step(v: dict[str, Any], tokens: Tensor) -> dict[str, Tensor]:
        parameters = {name: p * 1.0 for name, p in v["net"].named_parameters()}
        loss = cross_entropy(lambda t: torch.func.functional_call(v["net"], parameters, (t,)), tokens)
        gradients = torch.autograd.grad(loss, list(v["net"].parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(v["net"].parameters(), gradients, strict=True):
                parameter.sub_(0.1 * gradient)
        return {"loss": loss}

    graph = trace(step, {"net": Net()}, TOKENS)
    prefixed = {f"net.{scope}" for scope in MODULES}
    assert scopes(graph, Phase.FORWARD) >= prefixed
    assert scopes(graph, Phase.BACKWARD) >= prefixed
    last = [info(graph.node(graph.updates[f"net.{parameter}"])) for parameter in PARAMETERS]
    assert {origin.phase for origin in last} == {Phase.UPDATE}
    assert [origin.variable for origin in last] == [f"net.{parameter}" for parameter in PARAMETERS]


def test_an_evaluation_is_all_forward_and_updates_nothing() -> None:
    graph = evaluation_graph(Net(), cross_entropy, TOKENS)
    assert {info(n).phase for n in graph.nodes} == {Phase.FORWARD}
    assert not graph.updates


# Shapes that come later.


@pytest.mark.parametrize("size", [1, 7])
def test_a_graph_retraced_for_another_batch_is_the_graph_traced_with_it(size: int) -> None:
    tokens = torch.arange(size + 1) % 6
    graph = graph_of()
    assert graph.retrace is not None
    again, model = graph.retrace(tokens), Net()
    fresh = training_graph(model, cross_entropy, torch.optim.AdamW(model.parameters()), tokens)
    assert str(again) == str(fresh)
    assert again.variables == graph.variables
    assert again.feeds[0].spec.shape == (size + 1,)
