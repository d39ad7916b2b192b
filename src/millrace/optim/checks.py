"""Checks of arguments: every message says whose argument, what was expected and what was got."""

from __future__ import annotations

import math

from millrace.errors import SettingError


def check_number(
    owner: str,
    name: str,
    value: object,
    *,
    low: float = 0.0,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = True,
) -> None:
    """Raise SettingError unless `value` is a finite real number in the interval from `low` to `high`."""
    opening, closing = "(" if low_open else "[", ")" if high_open else "]"
    expected = f"{owner}: {name} must be a number in {opening}{low:g}, {high:g}{closing}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SettingError(f"{expected}, got {value!r}.")
    below = value <= low if low_open else value < low
    above = value >= high if high_open else value > high
    if not math.isfinite(value) or below or above:
        raise SettingError(f"{expected}, got {value!r}.")


def check_count(owner: str, name: str, value: object) -> None:
    """Raise SettingError unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingError(f"{owner}: {name} must be a whole number of at least 1, got {value!r}.")


def check_flag(owner: str, name: str, value: object) -> None:
    """Raise SettingError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise SettingError(f"{owner}: {name} must be True or False, got {value!r}.")


def check_betas(owner: str, value: object) -> None:
    """Raise SettingError unless `value` is a pair of decay rates in [0, 1)."""
    if not isinstance(value, tuple) or len(value) != 2:
        raise SettingError(f"{owner}: betas must be a pair of numbers in [0, 1), got {value!r}.")
    for index, beta in enumerate(value):
        check_number(owner, f"betas[{index}]", beta, high=1.0)
