"""Running means, rates and figures of merit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import FeedError
from millrace.train.metrics import (
    RunningMean,
    RunningMeans,
    ThroughputMeter,
    accuracy,
    bits_per_char,
    perplexity,
    top_accuracy,
)

numbers = st.floats(-1e3, 1e3, width=32)
weights = st.integers(1, 64)


@given(st.lists(st.tuples(numbers, weights, st.booleans()), min_size=1, max_size=30))
def test_the_running_mean_is_the_weighted_mean_of_numbers_and_tensors(items: list[tuple[float, int, bool]]) -> None:
    mean = RunningMean()
    for value, weight, as_tensor in items:
        mean.update(torch.tensor(value, requires_grad=True) if as_tensor else value, weight)
    expected = math.fsum(value * weight for value, weight, _ in items) / sum(weight for _, weight, _ in items)
    assert float(mean) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_long_mean_of_float32_keeps_its_digits() -> None:
    mean = RunningMean()
    value = torch.tensor(0.1)
    for _ in range(20_000):
        mean.update(value)
    assert float(mean) == pytest.approx(float(value), rel=1e-9)  # a float32 sum is 2e-5 off here


class CountingTensor(torch.Tensor):
    """Counts the reads that would wait for a device."""

    reads = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__float__):
            CountingTensor.reads += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_updating_reads_nothing_and_reading_reads_all_names_at_once() -> None:
    means = RunningMeans()
    CountingTensor.reads = 0
    for step in range(5):
        losses = {name: torch.tensor(float(step)).as_subclass(CountingTensor) for name in ("loss", "accuracy", "norm")}
        means.update({**losses, "rate": 0.5}, weight=step)
    assert CountingTensor.reads == 0
    assert means.read() == {"loss": 3.0, "accuracy": 3.0, "norm": 3.0, "rate": 0.5}
    assert CountingTensor.reads <= 1
    means.reset()
    assert means.read() == {}


def test_empty_means_are_nan_and_shapes_are_checked() -> None:
    assert math.isnan(float(RunningMean()))
    with pytest.raises(FeedError, match=r"loss takes scalars, got a tensor of shape \(3,\)"):
        RunningMeans().update({"loss": torch.zeros(3)})


@given(
    st.lists(st.floats(0.001, 20.0), min_size=1, max_size=40),
    st.floats(0.1, 100.0),
    st.integers(1, 512),
)
def test_a_steady_rate_is_measured_exactly_whatever_the_intervals(
    intervals_s: list[float], steps_per_s: float, batch: int
) -> None:
    meter = ThroughputMeter(start_s=100.0)
    assert meter.steps_per_s == 0.0
    now_s = 100.0
    for interval_s in intervals_s:
        now_s += interval_s
        steps = steps_per_s * interval_s
        meter.observe(now_s, steps, steps * batch)  # type: ignore[arg-type]
    assert meter.steps_per_s == pytest.approx(steps_per_s, rel=1e-6)
    assert meter.examples_per_s == pytest.approx(steps_per_s * batch, rel=1e-6)


def test_the_rate_follows_a_change_and_leaves_pauses_out() -> None:
    meter = ThroughputMeter(start_s=0.0, time_constant_s=1.0)
    for tick in range(1, 101):
        meter.observe(tick * 0.1, steps=1)
    meter.skip_to(1000.0)
    assert meter.steps_per_s == pytest.approx(10.0)
    for tick in range(1, 101):
        meter.observe(1000.0 + tick * 0.1, steps=5)
    assert meter.steps_per_s == pytest.approx(50.0, rel=1e-3)


@given(st.integers(0, 6), st.integers(1, 6))
def test_accuracy_is_the_share_of_right_answers_along_any_dimension(right: int, wrong: int) -> None:
    labels = torch.arange(right + wrong) % 4
    answers = torch.where(torch.arange(right + wrong) < right, labels, (labels + 1) % 4)
    logits = torch.nn.functional.one_hot(answers, 4).float()
    assert float(accuracy(logits, labels)) == pytest.approx(right / (right + wrong))
    assert float(accuracy(logits.T, labels, dim=0)) == pytest.approx(right / (right + wrong))


def test_accuracy_refuses_shapes_that_would_broadcast() -> None:
    with pytest.raises(FeedError, match=r"need labels of shape \(5,\), got \(5, 4\)"):
        accuracy(torch.zeros(5, 4), torch.zeros(5, 4))
    with pytest.raises(FeedError):
        accuracy(torch.zeros(5, 4), torch.zeros(1, dtype=torch.long))


def test_perplexity_and_bits_of_a_uniform_guess() -> None:
    for loss in (math.log(50), torch.tensor(math.log(50), dtype=torch.float64)):
        assert float(perplexity(loss)) == pytest.approx(50)
        assert float(bits_per_char(loss)) == pytest.approx(math.log2(50))
        assert float(bits_per_char(loss, chars_per_token=4)) == pytest.approx(math.log2(50) / 4)
    assert perplexity(1e6) == math.inf


def test_top_accuracy_counts_labels_among_the_largest() -> None:
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5], [9, 0, 0, 0, 0, -1]])
    labels = torch.tensor([1, 1, 5])
    shares = [float(top_accuracy(logits, labels, count)) for count in (1, 2, 5, 6, 9)]
    assert shares == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])
    assert float(top_accuracy(logits, logits.argmax(-1), 1)) == 1
    assert float(top_accuracy(logits[:, None], labels[:, None], 2)) == pytest.approx(1 / 3)
    with pytest.raises(FeedError, match="need labels of shape"):
        top_accuracy(logits, labels[:2])
