"""Every rule that torch has, against torch: same numbers after 50 steps on a problem with several parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from millrace.errors import SettingError
from millrace.optim import Optimizer, adagrad, adam, adamw, momentum, nesterov, rmsprop, sgd
from millrace.optim.rules.adagrad import Adagrad
from millrace.optim.rules.adam import Adam
from millrace.optim.rules.rmsprop import RMSProp
from millrace.optim.rules.sgd import SGD

torch.set_num_threads(1)

STEPS = 50
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}

Parameters = dict[str, Tensor]
Gradients = Callable[[Parameters, int], Parameters]
Pair = tuple[Optimizer, Callable[[list[Tensor]], torch.optim.Optimizer]]

rates = st.sampled_from([1e-4, 1e-3, 3e-3, 1e-2])
decays = st.sampled_from([0.0, 1e-3, 0.05])
momenta = st.sampled_from([0.3, 0.9, 0.95])
betas = st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.9, 0.99, 0.999]))
eps = st.sampled_from([1e-10, 1e-8, 1e-3])


def problem(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int
) -> tuple[Parameters, Callable[..., Parameters]]:
    """Parameters and their gradients at step i: a quadratic bowl seen through noise, the same for both sides."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    start = {f"layer.{i}": draw(*shape).to(dtype) for i, shape in enumerate(shapes)}
    noise = {f"layer.{i}": draw(STEPS, *shape).to(dtype) for i, shape in enumerate(shapes)}

    def gradients(parameters: Parameters, i: int) -> Parameters:
        return {name: 0.5 * value.detach() + noise[name][i] for name, value in parameters.items()}

    return start, gradients


def ours(optimizer: Optimizer, start: Parameters, gradients: Gradients) -> Parameters:
    parameters, state = dict(start), optimizer.init(start)
    for i in range(STEPS):
        parameters, state = optimizer.update(parameters, gradients(parameters, i), state, torch.tensor(i))
    return parameters


def theirs(
    make: Callable[..., torch.optim.Optimizer], start: Parameters, gradients: Callable[..., Parameters]
) -> Parameters:
    parameters = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimizer = make(list(parameters.values()))
    for i in range(STEPS):
        for name, gradient in gradients(parameters, i).items():
            parameters[name].grad = gradient
        optimizer.step()
    return {name: value.detach() for name, value in parameters.items()}


@st.composite
def sgd_pairs(draw: st.DrawFn) -> Pair:
    lr, decay, mu = draw(rates), draw(decays), draw(momenta)
    kind = draw(st.sampled_from(["plain", "momentum", "nesterov"]))
    if kind == "plain":
        return sgd(lr, weight_decay=decay), lambda p: torch.optim.SGD(p, lr, weight_decay=decay)
    make = momentum if kind == "momentum" else nesterov
    return make(lr, momentum=mu, weight_decay=decay), lambda p: torch.optim.SGD(
        p, lr, momentum=mu, weight_decay=decay, nesterov=kind == "nesterov"
    )


@st.composite
def adagrad_pairs(draw: st.DrawFn) -> Pair:
    settings_: dict[str, Any] = {
        "lr_decay": draw(st.sampled_from([0.0, 1e-2])),
        "initial_accumulator_value": draw(st.sampled_from([0.0, 0.1])),
        "eps": draw(eps),
        "weight_decay": draw(decays),
    }
    lr = draw(rates)
    return adagrad(lr, **settings_), lambda p: torch.optim.Adagrad(p, lr, **settings_)


@st.composite
def rmsprop_pairs(draw: st.DrawFn) -> Pair:
    settings_: dict[str, Any] = {
        "alpha": draw(st.sampled_from([0.9, 0.99])),
        "eps": draw(eps),
        "momentum": draw(st.sampled_from([0.0, 0.9])),
        "centered": draw(st.booleans()),
        "weight_decay": draw(decays),
    }
    lr = draw(rates)
    return rmsprop(lr, **settings_), lambda p: torch.optim.RMSprop(p, lr, **settings_)


@st.composite
def adam_pairs(draw: st.DrawFn) -> Pair:
    settings_: dict[str, Any] = {"betas": draw(betas), "eps": draw(eps), "weight_decay": draw(decays)}
    lr = draw(rates)
    if draw(st.booleans()):
        return adamw(lr, **settings_), lambda p: torch.optim.AdamW(p, lr, **settings_)
    return adam(lr, **settings_), lambda p: torch.optim.Adam(p, lr, **settings_)


shapes = st.lists(st.sampled_from([(), (1,), (7,), (3, 4), (2, 1, 5)]), min_size=1, max_size=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pairs", [sgd_pairs, adagrad_pairs, rmsprop_pairs, adam_pairs], ids=lambda f: f.__name__)
def test_fifty_steps_end_where_torch_ends(pairs: Callable[[], st.SearchStrategy[Pair]], dtype: torch.dtype) -> None:
    @settings(max_examples=25, deadline=None)
    @given(pair=pairs(), shapes=shapes, seed=st.integers(0, 2**20))
    def check(pair: Pair, shapes: list[tuple[int, ...]], seed: int) -> None:
        optimizer, make = pair
        start, gradients = problem(shapes, dtype, seed)
        expected = theirs(make, start, gradients)
        got = ours(optimizer, start, gradients)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])

    check()


@pytest.mark.parametrize(
    ("optimizer", "peer"),
    [
        (sgd(), torch.optim.SGD),
        (adagrad(), torch.optim.Adagrad),
        (rmsprop(), torch.optim.RMSprop),
        (adam(), torch.optim.Adam),
        (adamw(), torch.optim.AdamW),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_defaults_are_torchs(optimizer: Optimizer, peer: type[torch.optim.Optimizer]) -> None:
    start, gradients = problem([(5,), (2, 3)], torch.float64, seed=0)
    expected = theirs(peer, start, gradients)
    for name, value in ours(optimizer, start, gradients).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("optimizer", "peer"),
    [
        (sgd(1e-2), lambda p: torch.optim.SGD(p, 1e-2)),
        (momentum(1e-2), lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9)),
        (adagrad(1e-2), lambda p: torch.optim.Adagrad(p, 1e-2)),
        (rmsprop(1e-2), lambda p: torch.optim.RMSprop(p, 1e-2)),
        (adam(1e-2), lambda p: torch.optim.Adam(p, 1e-2)),
        (adamw(1e-2), lambda p: torch.optim.AdamW(p, 1e-2)),
    ],
    ids=["sgd", "momentum", "adagrad", "rmsprop", "adam", "adamw"],
)
def test_bfloat16_is_no_further_from_float32_than_torchs(
    optimizer: Optimizer, peer: Callable[..., torch.optim.Optimizer]
) -> None:
    start, gradients = problem([(512,)], torch.bfloat16, seed=1)
    exact = ours(optimizer, {name: value.float() for name, value in start.items()}, gradients)["layer.0"]
    got, torchs = ours(optimizer, start, gradients)["layer.0"], theirs(peer, start, gradients)["layer.0"]
    assert got.dtype == torch.bfloat16
    assert (got.float() - exact).abs().mean() <= 1.05 * (torchs.float() - exact).abs().mean()


def test_bfloat16_state_stays_bfloat16_and_a_0_dim_parameter_stays_0_dim() -> None:
    optimizer = adamw(1e-2)
    parameters = {"scale": torch.tensor(2.0, dtype=torch.bfloat16)}
    new, state = optimizer.update(
        parameters, {"scale": torch.tensor(1.0, dtype=torch.bfloat16)}, optimizer.init(parameters), torch.tensor(0)
    )
    assert new["scale"].shape == ()
    assert {value.dtype for value in (*new.values(), *state.values())} == {torch.bfloat16}


def test_first_adam_step_has_the_size_of_the_learning_rate_in_float32() -> None:
    # 1 - 0.999 as a float32 difference is off by 3e-5, which would show here.
    parameter = torch.zeros(1000)
    gradient = torch.linspace(0.5, 2.0, 1000)
    rule = Adam(eps=0.0)
    new, _ = rule.update(
        parameter, gradient, rule.init(parameter), learning_rate=torch.tensor(1.0), step=torch.tensor(0)
    )
    torch.testing.assert_close(new, -torch.ones(1000), rtol=0, atol=6e-7)


def test_weight_decay_of_a_rule_is_an_argument_of_update() -> None:
    parameter, gradient = torch.full((3,), 2.0), torch.zeros(3)
    coupled, _ = SGD().update(
        parameter, gradient, {}, learning_rate=torch.tensor(0.1), step=torch.tensor(0), weight_decay=0.5
    )
    torch.testing.assert_close(coupled, torch.full((3,), 2.0 - 0.1 * 0.5 * 2.0))
    rule = Adam(decoupled=True)
    decoupled, _ = rule.update(
        parameter,
        gradient,
        rule.init(parameter),
        learning_rate=torch.tensor(0.1),
        step=torch.tensor(0),
        weight_decay=0.5,
    )
    torch.testing.assert_close(decoupled, torch.full((3,), 2.0 * (1 - 0.1 * 0.5)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SGD(momentum=1.0), ["SGD", "momentum", "[0, 1)", "1.0"]),
        (lambda: SGD(nesterov=True), ["nesterov=True", "momentum"]),
        (lambda: SGD(nesterov=1), ["SGD", "nesterov", "True or False"]),  # type: ignore[arg-type]
        (lambda: Adagrad(lr_decay=-1.0), ["Adagrad", "lr_decay", "-1.0"]),
        (lambda: RMSProp(alpha=float("nan")), ["RMSProp", "alpha", "nan"]),
        (lambda: RMSProp(centered="yes"), ["RMSProp", "centered", "'yes'"]),  # type: ignore[arg-type]
        (lambda: Adam(betas=(0.9, 1.5)), ["Adam", "betas[1]", "[0, 1)", "1.5"]),
        (lambda: Adam(betas=0.9), ["Adam", "betas", "pair", "0.9"]),  # type: ignore[arg-type]
        (lambda: Adam(eps=True), ["Adam", "eps", "True"]),
    ],
)
def test_bad_constants_are_named(make: Callable[[], object], words: list[str]) -> None:
    with pytest.raises(SettingError) as caught:
        make()
    assert all(word in str(caught.value) for word in words)
