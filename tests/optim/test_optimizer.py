"""What surrounds a rule: names, groups, clipping, accumulation, absent gradients, tracing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from millrace import optim
from millrace.errors import SettingError
from millrace.optim import (
    Group,
    Optimizer,
    adagrad,
    adam,
    adamw,
    cosine,
    lion,
    momentum,
    nesterov,
    rmsprop,
    sgd,
    warmup,
)
from millrace.optim.rules.sgd import SGD

torch.set_num_threads(1)

MAKERS = [sgd, momentum, nesterov, adagrad, rmsprop, adam, adamw, lion]
Values = dict[str, Tensor]

schedule = warmup(3, then=cosine(1e-2, steps=20, end=1e-3))

EVERY_KIND = {
    **{make.__name__: make(1e-2) for make in MAKERS},
    "decayed": adamw(schedule, weight_decay=0.1),
    "coupled": nesterov(schedule, weight_decay=0.1),
    "centered": rmsprop(1e-2, centered=True, momentum=0.9),
    "fading adagrad": adagrad(1e-2, lr_decay=0.1, initial_accumulator_value=0.1),
    "lion with decay": lion(schedule, weight_decay=0.1),
    "averaged": replace(momentum(schedule), average=0.9),
    "everything": adamw(
        schedule, clip_norm=0.5, accumulate=3, groups=[Group("*.bias", scale=2.0, weight_decay=0.0), Group("a.*", 1e-3)]
    ),
}


def draw(seed: int, dtype: torch.dtype = torch.float64) -> Values:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"a.weight": (3, 4), "a.bias": (4,), "b.weight": (4, 2), "b.bias": ()}
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def run(optimizer: Optimizer, parameters: Values, gradients: list[Values]) -> tuple[Values, Values]:
    state = optimizer.init(parameters)
    for i, gradient in enumerate(gradients):
        parameters, state = optimizer.update(parameters, gradient, state, torch.tensor(i))
    return parameters, state


def close(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(got) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


# --- names and values ---------------------------------------------------------------------------------------------


def test_state_names_are_flat_and_hold_parameter_and_slot() -> None:
    assert list(adam().init({"fc.weight": torch.zeros(2)})) == [
        "optimizer/fc.weight/exp_avg",
        "optimizer/fc.weight/exp_avg_sq",
    ]
    assert sgd().init(draw(0)) == {}
    assert list(momentum(accumulate=2).init({"w": torch.zeros(2)})) == [
        "optimizer/w/momentum_buffer",
        "optimizer/w/gradient_sum",
    ]


@pytest.mark.parametrize("name", EVERY_KIND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_names_shapes_dtypes_stay_and_arguments_are_not_written(name: str, dtype: torch.dtype) -> None:
    optimizer = EVERY_KIND[name]
    parameters, gradients = draw(0, dtype), draw(1, dtype)
    state, step = optimizer.init(parameters), torch.tensor(2)
    given = [*parameters.values(), *gradients.values(), *state.values(), step]
    before = [value.clone() for value in given]
    for value in parameters.values():
        value.requires_grad_()
    new_parameters, new_state = optimizer.update(parameters, gradients, state, step)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    for old, new in ((parameters, new_parameters), (state, new_state)):
        assert list(new) == list(old)
        assert all((new[n].shape, new[n].dtype) == (old[n].shape, old[n].dtype) for n in old)
        assert not any(value.requires_grad for value in new.values())
    assert not any(torch.equal(new_parameters[n], parameters[n]) for n in parameters)


@pytest.mark.parametrize("name", EVERY_KIND)
@pytest.mark.parametrize("absent", ["missing", "none"])
def test_without_a_gradient_parameter_and_state_come_back_as_the_same_objects(name: str, absent: str) -> None:
    optimizer = EVERY_KIND[name]
    parameters = draw(0)
    gradients: dict[str, Tensor | None] = {**draw(1)}
    if absent == "missing":
        del gradients["a.weight"]
    else:
        gradients["a.weight"] = None
    state = optimizer.init(parameters)
    new_parameters, new_state = optimizer.update(parameters, gradients, state, torch.tensor(2))
    assert new_parameters["a.weight"] is parameters["a.weight"]
    assert all(new_state[n] is state[n] for n in state if "/a.weight/" in n)
    assert new_parameters["b.weight"] is not parameters["b.weight"]
    assert all(new_state[n] is not state[n] for n in state if "/b.weight/" in n)


def test_no_gradients_at_all_change_nothing() -> None:
    optimizer = EVERY_KIND["everything"]
    parameters = draw(0)
    state = optimizer.init(parameters)
    assert optimizer.update(parameters, {}, state, torch.tensor(0)) == (parameters, state)


def test_a_sparse_gradient_counts_as_its_dense_form() -> None:
    weight = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([1, 4, 4])
    (sparse,) = torch.autograd.grad(torch.nn.functional.embedding(rows, weight, sparse=True).pow(2).sum(), weight)
    (dense,) = torch.autograd.grad(torch.nn.functional.embedding(rows, weight).pow(2).sum(), weight)
    assert sparse.is_sparse
    parameters = {"w": weight.detach()}
    optimizer = momentum(0.1, clip_norm=0.5)
    close(run(optimizer, parameters, [{"w": sparse}] * 2)[0], run(optimizer, parameters, [{"w": dense}] * 2)[0])


def test_a_rule_of_ones_own_is_a_small_dataclass() -> None:
    @dataclass(frozen=True)
    class SignSGD(optim.Rule):
        @property
        def slots(self) -> tuple[str, ...]:
            return ()

        def at(self, *, learning_rate: Tensor, step: Tensor, weight_decay: float, dtype: torch.dtype) -> optim.Update:
            return lambda parameter, gradient, state: (parameter - learning_rate.to(dtype) * gradient.sign(), {})

    new, _ = run(Optimizer(SignSGD(), 0.5), {"w": torch.tensor([1.0, 1.0])}, [{"w": torch.tensor([3.0, -0.1])}])
    assert new["w"].tolist() == [0.5, 1.5]


# --- learning rate ------------------------------------------------------------------------------------------------


def test_schedules_drive_the_rate_as_torchs_do() -> None:
    parameters, gradients = draw(0), [draw(i + 1) for i in range(12)]
    theirs = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    peer = torch.optim.AdamW(theirs.values(), 1e-2, weight_decay=0.1)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(peer, 10)
    for gradient in gradients[:10]:
        for name, value in gradient.items():
            theirs[name].grad = value
        peer.step()
        fall.step()
    got, _ = run(adamw(cosine(1e-2, steps=10), weight_decay=0.1), parameters, gradients[:10])
    close(got, {name: value.detach() for name, value in theirs.items()})


def test_a_rate_of_zero_moves_nothing_even_where_gradients_are_zero() -> None:
    parameters = {"w": torch.ones(2)}
    for make in MAKERS:
        new, _ = run(make(lambda step: step * 0.0, weight_decay=0.1), parameters, [{"w": torch.tensor([0.0, 1.0])}] * 2)
        assert torch.equal(new["w"], parameters["w"]), make.__name__


def test_learning_rate_can_be_asked_for() -> None:
    optimizer = sgd(lambda step: step * 0.5, accumulate=2)
    assert [optimizer.learning_rate_at(torch.tensor(i)).item() for i in range(5)] == [0.0, 0.0, 0.5, 0.5, 1.0]
    assert sgd(0.25).learning_rate_at(torch.tensor(7)).item() == 0.25


def test_a_schedule_that_returns_no_tensor_is_refused() -> None:
    parameters = draw(0)
    optimizer = sgd(lambda step: 0.1)  # type: ignore[arg-type,return-value]
    with pytest.raises(SettingError, match=r"schedule must return a 0-dim floating tensor, got 0\.1"):
        optimizer.update(parameters, draw(1), {}, torch.tensor(0))


# --- groups -------------------------------------------------------------------------------------------------------


def test_the_first_matching_group_gives_a_parameter_its_settings() -> None:
    groups = [
        Group("b.bias", learning_rate=0.5),
        Group("*.bias", scale=3.0, weight_decay=0.0),
        Group("b.*", cosine(1, 4)),
    ]
    parameters, gradients = draw(0), [draw(1), draw(2)]
    got, _ = run(sgd(0.1, weight_decay=0.2, groups=groups), parameters, gradients)

    def alone(name: str, rate: Any, decay: float) -> Tensor:
        return run(sgd(rate, weight_decay=decay), {name: parameters[name]}, [{name: g[name]} for g in gradients])[0][
            name
        ]

    close(
        got,
        {
            "a.weight": alone("a.weight", 0.1, 0.2),
            "a.bias": alone("a.bias", 0.1 * 3.0, 0.0),
            "b.weight": alone("b.weight", cosine(1, 4), 0.2),
            "b.bias": alone("b.bias", 0.5, 0.2),
        },
    )


def test_groups_are_torchs_parameter_groups() -> None:
    parameters, gradients = draw(0), [draw(i + 1) for i in range(10)]
    theirs = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    weights, biases = ([v for n, v in theirs.items() if n.endswith(end)] for end in ("weight", "bias"))
    peer = torch.optim.AdamW([{"params": weights}, {"params": biases, "lr": 3e-3, "weight_decay": 0.0}], 1e-2)
    for gradient in gradients:
        for name, value in gradient.items():
            theirs[name].grad = value
        peer.step()
    got, _ = run(adamw(1e-2, groups=[Group("*.bias", 3e-3, weight_decay=0.0)]), parameters, gradients)
    close(got, {name: value.detach() for name, value in theirs.items()})


def test_a_group_that_matches_nothing_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(SettingError, match=r"'a\.wieght' matches no parameter.*'a\.weight'"):
        sgd(groups=[Group("a.wieght")]).init(draw(0))


# --- clipping and accumulation ------------------------------------------------------------------------------------


def test_clipping_comes_before_the_rule_and_is_torchs() -> None:
    parameters, gradients = draw(0), [draw(i + 1) for i in range(10)]
    theirs = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    peer = torch.optim.SGD(theirs.values(), 0.1, momentum=0.9, weight_decay=0.1)
    for gradient in gradients:
        for name, value in gradient.items():
            theirs[name].grad = value.clone()
        torch.nn.utils.clip_grad_norm_(theirs.values(), 0.7)
        peer.step()
    got, _ = run(momentum(0.1, weight_decay=0.1, clip_norm=0.7), parameters, gradients)
    close(got, {name: value.detach() for name, value in theirs.items()})


@settings(max_examples=30, deadline=None)
@given(make=st.sampled_from(MAKERS), k=st.integers(2, 5), updates=st.integers(1, 4), seed=st.integers(0, 2**20))
def test_accumulating_k_gradients_is_one_big_batch(
    make: Callable[..., Optimizer], k: int, updates: int, seed: int
) -> None:
    parameters, small = draw(seed), [draw(seed + i + 1) for i in range(k * updates)]
    big = [
        {name: torch.stack([g[name] for g in small[u * k : u * k + k]]).mean(0) for name in parameters}
        for u in range(updates)
    ]
    common: dict[str, Any] = {"weight_decay": 0.1, "clip_norm": 1.0}
    got, got_state = run(make(schedule, accumulate=k, **common), parameters, small)
    expected, expected_state = run(make(schedule, **common), parameters, big)
    close(got, expected)
    close({n: v for n, v in got_state.items() if not n.endswith("gradient_sum")}, expected_state)
    assert not any(v.any() for n, v in got_state.items() if n.endswith("gradient_sum"))


def test_between_applied_updates_only_the_sums_change() -> None:
    parameters, optimizer = draw(0), adamw(accumulate=3)
    start = optimizer.init(parameters)
    got, state = run(optimizer, parameters, [draw(1), draw(2)])
    close(got, parameters)
    for name, value in state.items():
        if name.endswith("gradient_sum"):
            parameter = name.split("/")[1]
            torch.testing.assert_close(value, draw(1)[parameter] + draw(2)[parameter])
        else:
            assert torch.equal(value, start[name])


def test_sums_of_bfloat16_gradients_keep_small_addends() -> None:
    parameters = {"w": torch.zeros(1, dtype=torch.bfloat16)}
    gradients = [{"w": torch.tensor([g], dtype=torch.bfloat16)} for g in [256.0] + [0.5] * 15]
    got, _ = run(sgd(1.0, accumulate=16), parameters, gradients)
    assert got["w"].item() == torch.tensor(-(256 + 7.5) / 16).bfloat16().item()


# --- tracing ------------------------------------------------------------------------------------------------------


def traced(optimizer: Optimizer, parameters: Values, gradients: Values, state: Values) -> torch.fx.GraphModule:
    def update(parameters: Values, gradients: Values, state: Values, step: Tensor) -> tuple[Values, Values]:
        return optimizer.update(parameters, gradients, state, step)

    return make_fx(update, tracing_mode="fake")(parameters, gradients, state, torch.tensor(0))


@pytest.mark.parametrize("name", EVERY_KIND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_traced_update_gives_the_same_numbers_at_every_step(name: str, dtype: torch.dtype) -> None:
    optimizer = EVERY_KIND[name]
    parameters = draw(0, dtype)
    state = optimizer.init(parameters)
    graph = traced(optimizer, parameters, draw(1, dtype), state)
    assert not list(graph.graph.find_nodes(op="get_attr")), "a tensor became a hidden constant"
    for i in range(7):
        gradients, step = draw(i + 1, dtype), torch.tensor(i)
        expected = optimizer.update(parameters, gradients, state, step)
        parameters, state = graph(parameters, gradients, state, step)
        for got, wanted in zip((parameters, state), expected, strict=True):
            assert all(torch.equal(got[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("name", [name for name in EVERY_KIND if name != "everything"])
def test_each_new_value_is_a_chain_on_the_old_one(name: str) -> None:
    """First arguments lead from the new value to the old; that is what lets a pass run the chain in place."""
    optimizer = EVERY_KIND[name]
    parameters = {n: v for n, v in draw(0).items() if n.endswith("weight")}
    state = optimizer.init(parameters)
    graph = traced(optimizer, parameters, {n: v for n, v in draw(1).items() if n in parameters}, state).graph
    placeholders = list(graph.find_nodes(op="placeholder"))
    old = placeholders[: len(parameters)] + placeholders[2 * len(parameters) : -1]
    new = next(iter(graph.find_nodes(op="output"))).args[0]
    assert len(new) == len(old)
    for before, after in zip(old, new, strict=True):
        node: Node = after
        links = []
        while node is not before:
            links.append(node)
            assert node.op == "call_function", f"{after} does not lead back to {before}"
            node = node.args[0]
        # Only the first link may read the old value, and only once.
        assert 1 <= len(links) <= 2
        assert sum(argument is before for link in links for argument in link.args) == 1


def test_scalars_are_computed_once_for_all_parameters() -> None:
    def scalar_nodes(count: int) -> int:
        parameters = {str(i): torch.zeros(3) for i in range(count)}
        optimizer = adamw(schedule)
        graph = traced(optimizer, parameters, parameters, optimizer.init(parameters)).graph
        return sum(node.op == "call_function" and node.meta["val"].dim() == 0 for node in graph.nodes)

    assert scalar_nodes(1) == scalar_nodes(20)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sgd(-0.1), ["SGD", "learning_rate", "-0.1", "schedule"]),
        (lambda: sgd("fast"), ["SGD", "learning_rate", "'fast'"]),
        (lambda: adam(weight_decay=-1), ["Adam", "weight_decay", "-1"]),
        (lambda: lion(clip_norm=0), ["Lion", "clip_norm", "(0, inf)", "got 0"]),
        (lambda: adamw(accumulate=0), ["Adam", "accumulate", "at least 1", "0"]),
        (lambda: adamw(groups=["*.bias"]), ["groups", "Group", "'*.bias'"]),
        (lambda: Group(""), ["Group", "pattern"]),
        (lambda: Group("*", scale=-1.0), ["Group", "scale", "-1.0"]),
        (lambda: Group("*", learning_rate=-1.0), ["Group", "learning_rate", "-1.0"]),
        (lambda: Optimizer(SGD, 0.1), ["rule", "Rule"]),
    ],
)
def test_bad_settings_are_named(make: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(SettingError) as caught:
        make()
    assert all(word in str(caught.value) for word in words)


def test_a_call_that_does_not_fit_is_refused() -> None:
    optimizer, parameters = adam(), draw(0)
    state, step = optimizer.init(parameters), torch.tensor(0)
    with pytest.raises(SettingError, match=r"'a\.wight', which is no parameter.*'a\.weight'"):
        optimizer.update(parameters, {"a.wight": torch.zeros(3, 4)}, state, step)
    with pytest.raises(SettingError, match=r"'a\.weight' must have the parameter's shape \[3, 4\], got \[4, 3\]"):
        optimizer.update(parameters, {"a.weight": torch.zeros(4, 3)}, state, step)
    with pytest.raises(SettingError, match=r"state must hold 'optimizer/a\.weight/exp_avg'"):
        optimizer.update(parameters, draw(1), {}, step)
    with pytest.raises(SettingError, match=r"step must be a 0-dim integer tensor, got shape \[1\]"):
        optimizer.update(parameters, draw(1), state, torch.tensor([0]))
    with pytest.raises(SettingError, match=r"'steps' must be real and floating.*torch\.int64"):
        optimizer.init({"steps": torch.tensor(0)})


def test_public_names() -> None:
    assert len(optim.__all__) == len(set(optim.__all__))
    assert all(
        inspect.getdoc(getattr(optim, name)) for name in optim.__all__ if name not in ("Schedule", "State", "Update")
    )
    assert {make.__name__ for make in MAKERS} <= set(optim.__all__)
