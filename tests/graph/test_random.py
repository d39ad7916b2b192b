"""Random numbers of a step: one stream, a variable like any other; the distributions that the operators promise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from millrace.errors import TraceError
from millrace.graph.random import REPLACEMENTS, new_random, uniform, uniform_in_aten
from millrace.graph.signature import Role
from millrace.graph.trace import trace

from .against_eager import Runner

COUNT = 20_000
aten = torch.ops.aten


def drawing(draw: Callable[[Tensor], Any], seed: int = 0, like: Tensor | None = None) -> Runner:
    """A step that returns what `draw` draws, given a tensor of `COUNT` zeros."""
    feed = torch.zeros(COUNT) if like is None else like
    return Runner(trace(lambda v, x: {"drawn": draw(x)}, {"w": torch.zeros(1)}, feed, seed=seed))


def drawn(draw: Callable[[Tensor], Any], seed: int = 0) -> Tensor:
    return drawing(draw, seed).step(torch.zeros(COUNT))["drawn"].double()


# Distributions. A mean of n draws is within 5 standard errors but for one case in two million; the seeds are fixed.

# name -> (draw, mean, standard deviation, least value, greatest value)
DRAWS: dict[str, tuple[Callable[[Tensor], Tensor], float, float, float, float]] = {
    "rand": (lambda x: torch.rand(COUNT), 1 / 2, math.sqrt(1 / 12), 0, 1),
    "rand of float64": (lambda x: torch.rand(COUNT, dtype=torch.float64), 1 / 2, math.sqrt(1 / 12), 0, 1),
    "rand_like": (lambda x: torch.rand_like(x), 1 / 2, math.sqrt(1 / 12), 0, 1),
    "randn": (lambda x: torch.randn(COUNT), 0, 1, -6, 6),
    "randn_like": (lambda x: torch.randn_like(x), 0, 1, -6, 6),
    "normal": (lambda x: torch.normal(x + 2, x + 3), 2, 3, -16, 20),
    "normal with one mean": (lambda x: torch.normal(x + 2, 3.0), 2, 3, -16, 20),
    "normal with numbers": (lambda x: torch.normal(2.0, 3.0, (COUNT,)), 2, 3, -16, 20),
    "normal with one deviation": (lambda x: torch.normal(2.0, x + 3), 2, 3, -16, 20),
    "normal_": (lambda x: torch.empty(COUNT).normal_(2, 3), 2, 3, -16, 20),
    "uniform_": (lambda x: x.clone().uniform_(-1, 3), 1, 4 * math.sqrt(1 / 12), -1, 3),
    "exponential_": (lambda x: x.clone().exponential_(2.0), 1 / 2, 1 / 2, 0, 9),
    "bernoulli": (lambda x: torch.bernoulli(x + 0.3), 0.3, math.sqrt(0.21), 0, 1),
    "bernoulli with p": (lambda x: x.bernoulli(0.3), 0.3, math.sqrt(0.21), 0, 1),
    "bernoulli_": (lambda x: x.clone().bernoulli_(0.3), 0.3, math.sqrt(0.21), 0, 1),
    "bernoulli_ of one half": (lambda x: x.clone().bernoulli_(), 1 / 2, 1 / 2, 0, 1),
    "bernoulli_ by tensor": (lambda x: x.clone().bernoulli_(x + 0.3), 0.3, math.sqrt(0.21), 0, 1),
    "randint": (lambda x: torch.randint(5, (COUNT,)), 2, math.sqrt(2), 0, 4),
    "randint between": (lambda x: torch.randint(3, 8, (COUNT,)), 5, math.sqrt(2), 3, 7),
    "randint_like": (lambda x: torch.randint_like(x, 5), 2, math.sqrt(2), 0, 4),
    "randint_like between": (lambda x: torch.randint_like(x, 3, 8), 5, math.sqrt(2), 3, 7),
    "multinomial": (
        lambda x: torch.multinomial(torch.tensor([1.0, 2.0, 1.0]), COUNT, replacement=True),
        1,
        math.sqrt(1 / 2),
        0,
        2,
    ),
    "multinomial without replacement": (
        lambda x: torch.multinomial((x + 1).reshape(-1, 4) * torch.tensor([1.0, 0, 0, 3]), 1),
        9 / 4,
        math.sqrt(27 / 16),
        0,
        3,
    ),
    "dropout": (lambda x: F.dropout(x + 1, 0.25), 1, math.sqrt(1 / 3), 0, 4 / 3),
    "alpha dropout": (lambda x: F.alpha_dropout(torch.randn(COUNT), 0.25), 0, 1, -6, 6),
    "feature dropout": (lambda x: F.dropout1d((x + 1).reshape(1, -1, 1), 0.25), 1, math.sqrt(1 / 3), 0, 4 / 3),
    "gumbel_softmax": (lambda x: F.gumbel_softmax(x.reshape(-1, 2), hard=True)[:, 0], 1 / 2, 1 / 2, 0, 1),
    "rrelu": (lambda x: F.rrelu(x - 1, 0.2, 0.4, training=True), -0.3, 0.2 * math.sqrt(1 / 12), -0.4, -0.2),
    "a distribution": (
        lambda x: torch.distributions.Normal(x + 2, x + 3).rsample(),
        2,
        3,
        -16,
        20,
    ),
    "a categorical": (lambda x: torch.distributions.Categorical(logits=x.reshape(-1, 2)).sample(), 0.5, 0.5, 0, 1),
}


@pytest.mark.parametrize("name", DRAWS)
def test_distribution(name: str) -> None:
    draw, mean, deviation, least, greatest = DRAWS[name]
    values = drawn(draw)
    error = deviation / math.sqrt(values.numel())
    assert abs(float(values.mean()) - mean) < 5 * error
    assert abs(float(values.std()) / deviation - 1) < 0.05
    assert float(values.min()) >= least
    assert float(values.max()) <= greatest + 1e-6
    # Neighbours have nothing to do with each other.
    flat = values.flatten() - values.mean()
    assert abs(float((flat[1:] * flat[:-1]).mean())) < 5 * deviation**2 / math.sqrt(flat.numel())


def test_uniform_numbers_fill_the_unit_interval_evenly() -> None:
    values = drawn(lambda x: torch.rand(COUNT)).sort().values
    expected = (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT
    assert float((values - expected).abs().max()) < 1.95 / math.sqrt(COUNT)  # Kolmogorov and Smirnov at 0.1 %


def test_normal_numbers_have_the_normal_distribution() -> None:
    values = drawn(lambda x: torch.randn(COUNT)).sort().values
    expected = (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT
    assert float((torch.special.ndtr(values) - expected).abs().max()) < 1.95 / math.sqrt(COUNT)


def test_a_permutation_has_every_number_once() -> None:
    values = drawn(lambda x: torch.randperm(1000))
    assert torch.equal(values.sort().values, torch.arange(1000).double())
    assert float((values == torch.arange(1000)).double().mean()) < 0.02


def test_every_replaced_operator_is_drawn_from_above(monkeypatch: pytest.MonkeyPatch) -> None:
    """What these tests call reaches every entry of the table."""
    reached = set()

    def noting(name: OpOverload, make: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            reached.add(name)
            return make(*arguments, **options)

        return noted

    for name, make in list(REPLACEMENTS.items()):
        monkeypatch.setitem(REPLACEMENTS, name, noting(name, make))
    for draw, *_ in DRAWS.values():
        drawing(draw)
    for draw in (
        lambda x: torch.randperm(9),
        lambda x: aten.native_dropout.default(x, 0.5, True)[0],
        lambda x: aten.uniform.default(x),
        lambda x: aten.normal_functional.default(x),
    ):
        drawing(draw)
    assert reached == set(REPLACEMENTS)


def test_an_operator_without_a_replacement_is_refused() -> None:
    with pytest.raises(
        TraceError, match=r"test_random.py:\d+ in <lambda>: `aten.poisson.default` draws(.|\n)*torch.rand"
    ):
        drawing(lambda x: torch.poisson(x + 1))


# The stream.


def test_the_same_seed_repeats_a_run_and_steps_differ() -> None:
    runs = []
    for seed in (3, 3, 4):
        runner = drawing(lambda x: torch.rand(50), seed)
        runs.append(torch.stack([runner.step(torch.zeros(COUNT))["drawn"] for _ in range(3)]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert len({tuple(step.tolist()) for step in runs[0]}) == 3


def test_the_stream_is_a_variable_and_continues_from_its_value() -> None:
    runner = drawing(lambda x: torch.rand(5), seed=7)
    (stream,) = [v for v in runner.graph.variables if v.role is Role.RANDOM]
    assert runner.variables[stream.name].tolist() == [7, 0]
    runner.step(torch.zeros(COUNT))
    saved = runner.variables[stream.name].clone()
    assert saved.tolist() == [7, 1]
    after = [runner.step(torch.zeros(COUNT))["drawn"] for _ in range(2)]
    other = drawing(lambda x: torch.rand(5), seed=0)
    other.variables[stream.name] = saved
    assert [torch.equal(other.step(torch.zeros(COUNT))["drawn"], want) for want in after] == [True, True]


def test_a_step_that_draws_nothing_has_no_stream() -> None:
    graph = trace(
        lambda v, x: F.dropout(x, 0.5, training=False) + F.dropout(x, 0.0), {"w": torch.ones(1)}, torch.ones(3)
    )
    assert [v.name for v in graph.variables] == ["w"]


def test_draws_of_one_step_differ() -> None:
    values = drawn(lambda x: torch.stack([torch.rand(50) for _ in range(4)]))
    assert len({tuple(row.tolist()) for row in values}) == 4


def test_the_callers_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    drawing(lambda x: torch.rand(5)).step(torch.zeros(COUNT))
    assert torch.equal(torch.get_rng_state(), before)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**62), st.integers(0, 2**40), st.integers(1, 1000), st.lists(st.integers(0, 7), max_size=3))
def test_the_kernel_is_the_arithmetic_that_compilers_get(seed: int, counter: int, op: int, size: list[int]) -> None:
    random = torch.tensor([seed, counter])
    kernel = uniform(random, op, size)
    assert torch.equal(kernel, uniform_in_aten(random, op, size))
    assert kernel.shape == torch.Size(size)
    assert kernel.numel() == 0 or (float(kernel.min()) >= 0 and float(kernel.max()) < 1)


def test_the_kernel_in_chunks_is_the_arithmetic_in_one_piece() -> None:
    random = new_random(5)
    assert torch.equal(uniform(random, 2, [3, 50_000]), uniform_in_aten(random, 2, [3, 50_000]))


@pytest.mark.parametrize(("index", "name"), [(0, "seed"), (1, "counter")])
def test_neighbouring_streams_are_unrelated(index: int, name: str) -> None:
    random = new_random(0)
    draws = []
    for value in range(50):
        random[index] = value
        draws.append(uniform(random, 1, [1000]).double() - 0.5)
    related = torch.corrcoef(torch.stack(draws)) - torch.eye(50, dtype=torch.float64)
    assert float(related.abs().max()) < 5.5 / math.sqrt(1000), name


# Dropout, forward and backward.


class Dropping(nn.Module):
    """Two dropouts, the second inside a block that may be checkpointed."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.first, self.second, self.checkpointed = nn.Linear(8, 8), nn.Linear(8, 8), checkpointed

    def block(self, x: Tensor) -> Tensor:
        return F.dropout(F.dropout(self.second(x), 0.5).tanh(), 0.25)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.first(x), 0.5)
        x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        return F.dropout(x, 0.1)


def test_recomputation_draws_the_mask_of_the_forward_pass() -> None:
    def step(v: dict[str, Any], x: Tensor) -> dict[str, Tensor]:
        loss = v[""](x).pow(2).sum()
        names, parameters = zip(*v[""].named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, parameters)
        return {"loss": loss, **dict(zip(names, gradients, strict=True))}

    x, plain, again = torch.randn(16, 8), Dropping(False), Dropping(True)
    again.load_state_dict(plain.state_dict())
    runners = [Runner(trace(step, {"": model}, x)) for model in (plain, again)]
    for _ in range(3):
        expected, got = (runner.step(x) for runner in runners)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)
    draws = [n for n in runners[1].graph.nodes if n.target is torch.ops.millrace.uniform.default]
    assert len(draws) == 4  # the recomputed ones are the same as the first, and so are the same nodes


def test_dropped_elements_have_no_gradient_and_kept_ones_are_scaled() -> None:
    def step(v: dict[str, Any], x: Tensor) -> dict[str, Tensor]:
        y = F.dropout(v["w"] * x, 0.25)
        return {"y": y, "gradient": torch.autograd.grad(y.sum(), v["w"])[0]}

    x = torch.ones(400)
    got = Runner(trace(step, {"w": torch.full((400,), 3.0, requires_grad=True)}, x)).step(x)
    kept = got["y"] != 0
    assert 0.65 < float(kept.double().mean()) < 0.85
    torch.testing.assert_close(got["y"][kept], torch.full_like(got["y"][kept], 4.0))
    torch.testing.assert_close(got["gradient"], torch.where(kept, 4 / 3, 0.0))


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_everything(p: float) -> None:
    got = drawing(lambda x: F.dropout(x + 1, p)).step(torch.zeros(COUNT))["drawn"]
    assert torch.equal(got, torch.full((COUNT,), 1 - p))


def test_dropout_in_bfloat16_never_draws_one() -> None:
    got = drawing(lambda x: F.dropout(x.bfloat16() + 1, 0.001)).step(torch.zeros(COUNT))["drawn"]
    assert 0 < float((got == 0).double().mean()) < 0.003


@pytest.mark.parametrize("by_name", [False, True])
def test_attention_with_dropout(by_name: bool) -> None:
    attention = F.scaled_dot_product_attention

    def step(v: dict[str, Any], x: Tensor) -> dict[str, Tensor]:
        call = attention if by_name else F.scaled_dot_product_attention
        full, causal = call(x, x, x, dropout_p=0.5), call(x, x, x, None, 0.5, True)
        return {"full": full, "causal": causal, "none": call(x, x, x)}

    x = torch.randn(64, 2, 6, 4)
    runner = Runner(trace(step, {"w": torch.ones(1)}, x))
    first, second = runner.step(x), runner.step(x)
    assert not torch.equal(first["full"], second["full"])
    with sdpa_kernel(SDPBackend.MATH):
        plain = F.scaled_dot_product_attention(x, x, x)
    torch.testing.assert_close(first["none"], plain, rtol=1e-5, atol=1e-5)
    many = torch.stack([runner.step(x)["full"] for _ in range(200)])
    assert float((many.mean(0) - plain).abs().mean()) < 0.1  # dropout leaves the mean as it is
    # A causal row sees itself alone at first: kept and doubled, or dropped.
    rows = first["causal"][:, :, 0]
    doubled = (rows - 2 * x[:, :, 0]).abs().amax(-1) < 1e-5
    assert bool((doubled | (rows.abs().amax(-1) < 1e-6)).all())
    assert 0.3 < float(doubled.double().mean()) < 0.7
