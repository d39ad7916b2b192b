"""Schedules against torch.optim.lr_scheduler where it has them, against their formulas where not."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import lr_scheduler

from millrace.errors import SettingError
from millrace.optim import (
    Schedule,
    constant,
    cosine,
    exponential,
    inverse_square_root,
    linear,
    piecewise,
    step_decay,
    warmup,
)
from millrace.optim.schedule import warmup_cosine

ALL: dict[str, Schedule] = {
    "constant": constant(0.1),
    "linear": linear(0.1, steps=20, end=0.01),
    "cosine": cosine(0.1, steps=20, end=0.01),
    "exponential": exponential(0.1, factor=0.5, every=10),
    "step_decay": step_decay(0.1, every=10, factor=0.5),
    "piecewise": piecewise((5, 15), (0.1, 0.2, 0.05)),
    "inverse_square_root": inverse_square_root(0.1, steps=7),
    "warmup": warmup(5, then=cosine(0.1, steps=15)),
    "warmup to a number": warmup(5, then=0.1),
}


def rates(schedule: Schedule, steps: int) -> list[float]:
    return [schedule(torch.tensor(i, dtype=torch.float64)).item() for i in range(steps)]


def torchs(make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], lr: float, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


lrs = st.floats(1e-4, 1.0)
counts = st.integers(1, 30)


@settings(max_examples=30, deadline=None)
@given(lr=lrs, steps=counts, end=st.sampled_from([0.0, 0.1, 0.5, 2.0]))
def test_linear_and_cosine_are_torchs(lr: float, steps: int, end: float) -> None:
    expected = torchs(lambda o: lr_scheduler.LinearLR(o, 1.0, min(end, 1.0), steps), lr, 40)
    assert rates(linear(lr, steps, lr * min(end, 1.0)), 40) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    # torch's cosine goes up again after its steps; ours stays at the end.
    expected = torchs(lambda o: lr_scheduler.CosineAnnealingLR(o, steps, end), lr, steps + 1)
    got = rates(cosine(lr, steps, end), 40)
    assert got[: steps + 1] == pytest.approx(expected[:40], rel=1e-9, abs=1e-12)
    assert got[steps + 1 :] == pytest.approx([end] * len(got[steps + 1 :]), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(lr=lrs, every=counts, factor=st.sampled_from([0.1, 0.5, 0.97, 1.0]))
def test_exponential_and_step_decay_are_torchs(lr: float, every: int, factor: float) -> None:
    expected = torchs(lambda o: lr_scheduler.ExponentialLR(o, factor), lr, 40)
    assert rates(exponential(lr, factor), 40) == pytest.approx(expected, rel=1e-9)
    assert rates(exponential(lr, factor, every), every + 1)[-1] == pytest.approx(lr * factor, rel=1e-9)
    expected = torchs(lambda o: lr_scheduler.StepLR(o, every, factor), lr, 40)
    assert rates(step_decay(lr, every, factor), 40) == pytest.approx(expected, rel=1e-9)


def test_piecewise_is_torchs_multi_step() -> None:
    expected = torchs(lambda o: lr_scheduler.MultiStepLR(o, [3, 8], 0.1), 0.5, 12)
    assert rates(piecewise((3, 8), (0.5, 0.05, 0.005)), 12) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(lr=lrs, steps=st.integers(1, 10), first=st.sampled_from([0.01, 0.3, 1.0]), after=counts)
def test_warmup_is_torchs_linear_then_the_next_schedule(lr: float, steps: int, first: float, after: int) -> None:
    def sequence(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
        rise = lr_scheduler.LinearLR(optimizer, first, 1.0, steps)
        fall = lr_scheduler.ExponentialLR(optimizer, 0.9)
        return lr_scheduler.SequentialLR(optimizer, [rise, fall], [steps])

    got = rates(warmup(steps, then=exponential(lr, 0.9), from_factor=first), steps + after)
    assert got == pytest.approx(torchs(sequence, lr, steps + after), rel=1e-9)


def test_warmup_first_moves_and_reaches_the_rate_after_its_steps() -> None:
    assert rates(warmup(4, then=1.0), 7) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0])


def test_inverse_square_root_after_warmup_is_the_transformers_schedule() -> None:
    n, peak = 40, 0.3
    got = rates(warmup(n, then=inverse_square_root(peak, steps=n), from_factor=0.0), 200)
    expected = [peak * math.sqrt(n) * min((i or 1) ** -0.5, i * n**-1.5) for i in range(200)]
    assert got == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_integer_steps_give_float32_and_the_same_rate(name: str) -> None:
    for i, exact in enumerate(rates(ALL[name], 30)):
        rate = ALL[name](torch.tensor(i))
        assert (rate.dtype, rate.dim()) == (torch.float32, 0)
        assert rate.item() == pytest.approx(exact, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_schedules_trace_without_hidden_constants_and_follow_the_step(name: str) -> None:
    graph = make_fx(ALL[name], tracing_mode="fake")(torch.tensor(3))
    assert not list(graph.graph.find_nodes(op="get_attr"))
    for i in (0, 4, 5, 10, 15, 20, 1000):
        assert torch.equal(graph(torch.tensor(i)), ALL[name](torch.tensor(i)))


@pytest.mark.parametrize("name", ALL)
def test_schedules_survive_pickling_and_compare(name: str) -> None:
    assert pickle.loads(pickle.dumps(ALL[name])) == ALL[name]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: constant(-0.1), ["constant", "value", "-0.1"]),
        (lambda: linear("0.1", 5), ["linear", "start", "'0.1'"]),  # type: ignore[arg-type]
        (lambda: cosine(0.1, 0), ["cosine", "steps", "at least 1", "0"]),
        (lambda: cosine(0.1, 2.5), ["cosine", "steps", "2.5"]),  # type: ignore[arg-type]
        (lambda: exponential(0.1, 0.0), ["exponential", "factor", "(0, 1]", "0.0"]),
        (lambda: step_decay(0.1, 5, 1.5), ["step_decay", "factor", "1.5"]),
        (lambda: piecewise((5, 5), (1.0, 2.0, 3.0)), ["piecewise", "boundaries", "increase"]),
        (lambda: piecewise((5,), (1.0,)), ["piecewise", "values", "(2)", "1"]),
        (lambda: piecewise([5], (1.0, 2.0)), ["piecewise", "boundaries", "tuple"]),  # type: ignore[arg-type]
        (lambda: inverse_square_root(0.1, -1), ["inverse_square_root", "steps", "-1"]),
        (lambda: warmup(5, then=-1.0), ["warmup", "then", "schedule", "-1.0"]),
        (lambda: warmup(5, then=1.0, from_factor=2.0), ["warmup", "from_factor", "2.0"]),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], object], words: list[str]) -> None:
    with pytest.raises(SettingError) as caught:
        make()
    assert all(word in str(caught.value) for word in words)


@settings(deadline=None, max_examples=30)
@given(lrs, counts, counts, st.floats(0, 1))
def test_warmup_and_cosine_in_one_climb_to_the_peak_and_end_with_the_run(
    peak: float, rise: int, fall: int, share: float
) -> None:
    found = rates(warmup_cosine(peak, rise + fall, rise, end=share * peak), rise + fall + 1)
    assert max(found) == pytest.approx(peak)
    assert found[rise] == pytest.approx(peak)
    assert found[:rise] == sorted(found[:rise])
    assert found[rise:] == pytest.approx(sorted(found[rise:], reverse=True))  # a share of 1 is level, up to rounding
    assert found[-1] == pytest.approx(share * peak)


@settings(deadline=None, max_examples=30)
@given(lrs, counts)
def test_a_run_of_one_step_has_a_schedule_too(peak: float, steps: int) -> None:
    assert all(0 < rate <= peak for rate in rates(warmup_cosine(peak, 1, 0), 1))
    assert rates(warmup_cosine(peak, steps, 0), steps) == rates(warmup_cosine(peak, steps, 1), steps)
