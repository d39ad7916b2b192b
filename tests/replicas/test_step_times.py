"""How long members may show no progress."""

from __future__ import annotations

import pytest

from millrace.replicas.step_times import StepTimes


@pytest.mark.parametrize(
    ("compile", "given_s", "first_s"),
    [
        ("eager", None, 120),
        ("eager", 5.0, 120),
        ("eager", 600.0, 600),
        ("inductor", None, 3600),
        ("inductor", 9e3, 9e3),
    ],
)
def test_a_first_run_has_long_and_longer_where_that_is_wished(
    compile: str, given_s: float | None, first_s: float
) -> None:
    times = StepTimes(compile, given_s)
    assert times.first_s == times.patience_s == first_s
    times.add(1.0)
    assert times.first_s == first_s
    assert times.patience_s == (given_s or 10.0)
