"""A cascade: what is saved by its formula, and times of work that is known."""

from __future__ import annotations

import time

import pytest

from millrace.models.cascade import Cascade, seconds_each


@pytest.mark.parametrize(
    ("quick_s", "slow_s", "passed", "saved"),
    [(0.0, 1.0, 1.0, 0.0), (0.0, 1.0, 0.0, 1.0), (0.1, 1.0, 0.5, 0.4), (2.0, 1.0, 0.5, -1.5)],
)
def test_saved_is_what_the_slow_one_need_not_do_less_the_quick_one(
    quick_s: float, slow_s: float, passed: float, saved: float
) -> None:
    assert Cascade(quick_s, slow_s, passed).saved == pytest.approx(saved)


def test_every_example_is_worked_on_in_every_turn_and_timed() -> None:
    done: list[int] = []

    def work(example: int) -> None:
        time.sleep(0.01)
        done.append(example)

    assert seconds_each(work, [1, 2, 3], turns=2) >= 0.01
    assert done == [1, 2, 3] * 2
