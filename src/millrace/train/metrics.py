"""Means over many steps, rates, and the common figures of merit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import SupportsFloat, TypeVar

import torch

from millrace.errors import FeedError

Number = TypeVar("Number", float, torch.Tensor)


class RunningMean:
    """The weighted mean of scalars, summed where they are: only reading it waits for the device."""

    def __init__(self, name: str = "a value") -> None:
        self._name = name
        self._total: torch.Tensor | float = 0.0
        self._weight = 0.0

    def update(self, value: torch.Tensor | float, weight: float = 1.0) -> None:
        """Take in one value.

        Args:
            value: a number, or a tensor with one element.
            weight: for example the number of examples that `value` is the mean of.

        Raises:
            FeedError: `value` has several elements.
        """
        self._weight += weight
        if not isinstance(value, torch.Tensor):
            self._total = self._total + value * weight
            return
        if value.numel() != 1:
            raise FeedError(
                f"The mean of {self._name} takes scalars, got a tensor of shape {tuple(value.shape)}. "
                "Reduce it first, for example with .mean()."
            )
        if not isinstance(self._total, torch.Tensor):
            self._total = torch.full((), self._total, dtype=_sum_dtype(value.device), device=value.device)
        # One small kernel per step; the sum's dtype wins.
        self._total = torch.add(self._total, value.detach().reshape(()), alpha=weight)

    def __float__(self) -> float:
        """The mean so far; NaN before the first value."""
        return float(self._total) / self._weight if self._weight else math.nan

    @property
    def total(self) -> torch.Tensor | float:
        """The weighted sum, unread."""
        return self._total

    @property
    def weight(self) -> float:
        """The sum of the weights."""
        return self._weight


class RunningMeans:
    """One running mean per name."""

    def __init__(self) -> None:
        self._means: dict[str, RunningMean] = {}

    def update(self, values: Mapping[str, torch.Tensor | float], weight: float = 1.0) -> None:
        """Take in one value per name, all with the same weight (see `RunningMean.update`)."""
        for name, value in values.items():
            self._means.setdefault(name, RunningMean(name)).update(value, weight)

    def read(self) -> dict[str, float]:
        """All means, in one wait per device."""
        on_device: dict[torch.device, list[str]] = {}
        for name, mean in self._means.items():
            if isinstance(mean.total, torch.Tensor):
                on_device.setdefault(mean.total.device, []).append(name)
        totals: dict[str, SupportsFloat] = {name: mean.total for name, mean in self._means.items()}
        for names in on_device.values():
            stacked = torch.stack([torch.as_tensor(self._means[name].total) for name in names])
            totals.update(zip(names, stacked.tolist(), strict=True))
        return {
            name: float(totals[name]) / mean.weight if mean.weight else math.nan for name, mean in self._means.items()
        }

    def reset(self) -> None:
        """Forget everything."""
        self._means.clear()


class ThroughputMeter:
    """Steps and examples per second, of late: what lies `time_constant_s` back counts 1/e.

    Both counts and the time they took decay alike, so that the ratio is right from the first interval on.

    Args:
        start_s: the time now, on any steady clock.
        time_constant_s: how long the meter remembers.
    """

    def __init__(self, start_s: float, time_constant_s: float = 5.0) -> None:
        self._last_s = start_s
        self._time_constant_s = time_constant_s
        self._span_s = self._steps = self._examples = 0.0

    def observe(self, now_s: float, steps: int = 1, examples: int = 0) -> None:
        """Take in what was done since the last call."""
        interval_s = max(0.0, now_s - self._last_s)
        decay = math.exp(-interval_s / self._time_constant_s)
        self._span_s = self._span_s * decay + interval_s
        self._steps = self._steps * decay + steps
        self._examples = self._examples * decay + examples
        self._last_s = now_s

    def skip_to(self, now_s: float) -> None:
        """Leave out the time since the last call (an evaluation, a checkpoint)."""
        self._last_s = now_s

    @property
    def steps_per_s(self) -> float:
        """0 before any time has passed."""
        return self._steps / self._span_s if self._span_s > 0 else 0.0

    @property
    def examples_per_s(self) -> float:
        """0 before any time has passed."""
        return self._examples / self._span_s if self._span_s > 0 else 0.0


def read_scalar(value: SupportsFloat) -> float:
    """The number in a tensor (which waits for its device) or in anything else that has one."""
    return float(value.detach() if isinstance(value, torch.Tensor) else value)


def accuracy(logits: torch.Tensor, labels: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """The share of `labels` that the largest logit names.

    Args:
        logits: (…, classes), or with the classes at `dim`.
        labels: (…), integers: the shape of `logits` without `dim`.
        dim: the dimension of the classes.

    Returns:
        A scalar float32 on the same device, unread.

    Raises:
        FeedError: the shapes do not fit.
    """
    expected = list(logits.shape)
    del expected[dim]
    if list(labels.shape) != expected:
        raise FeedError(
            f"accuracy: logits of shape {tuple(logits.shape)} with classes at dimension {dim} need labels of shape "
            f"{tuple(expected)}, got {tuple(labels.shape)}. One-hot labels: pass labels.argmax({dim})."
        )
    return (logits.argmax(dim) == labels).to(torch.float32).mean()


def top_accuracy(logits: torch.Tensor, labels: torch.Tensor, count: int = 5) -> torch.Tensor:
    """The share of `labels` that are among the `count` largest logits; all of them where there are no more classes.

    Args:
        logits: (…, classes).
        labels: (…), integers: the shape of `logits` without its last dimension.

    Returns:
        A scalar float32 on the same device, unread.

    Raises:
        FeedError: the shapes do not fit.
    """
    if labels.shape != logits.shape[:-1]:
        raise FeedError(
            f"top_accuracy: logits of shape {tuple(logits.shape)} need labels of shape {tuple(logits.shape[:-1])}, got "
            f"{tuple(labels.shape)}."
        )
    best = logits.topk(min(count, logits.shape[-1]), dim=-1).indices
    return (best == labels.unsqueeze(-1)).any(-1).to(torch.float32).mean()


def perplexity(mean_loss: Number) -> Number:
    """How many equally likely tokens would be as surprising: e^loss. Infinite where that overflows.

    Take it of a mean over all tokens: the mean of several perplexities is something else.

    Args:
        mean_loss: cross-entropy per token, in nats.
    """
    if isinstance(mean_loss, torch.Tensor):
        return torch.exp(mean_loss)
    try:
        return math.exp(mean_loss)
    except OverflowError:
        return math.inf


def bits_per_char(mean_loss: Number, chars_per_token: float = 1.0) -> Number:
    """Cross-entropy in bits per character of the text.

    Args:
        mean_loss: cross-entropy per token, in nats.
        chars_per_token: the mean length of a token, in characters.
    """
    return mean_loss / (math.log(2) * chars_per_token)


def _sum_dtype(device: torch.device) -> torch.dtype:
    # A float32 sum over a long epoch loses the last values' digits; Apple's GPU has no float64.
    return torch.float32 if device.type == "mps" else torch.float64
