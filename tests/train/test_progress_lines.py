"""What is shown of a run can be read again from its log."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.train.progress import View
from millrace.train.progress_lines import LastProgress, last_progress

NUMBERS = st.floats(1e-6, 1e7)


@given(st.integers(0, 10**7), st.none() | st.integers(10**7, 10**8), st.none() | st.integers(1, 99), NUMBERS, NUMBERS)
def test_lines_of_progress_are_understood(
    step: int, total: int | None, epoch: int | None, loss: float, rate: float
) -> None:
    view = View(step, total, epoch, None, {"loss": loss, "accuracy": 0.5}, rate, 64 * rate, 100.0)
    found = last_progress(f"run directory: x\n{view.counter()}  {view.detail()}\nwarning: step 7\n")
    assert found.step == step
    assert found.loss == pytest.approx(loss, rel=1e-3)
    assert found.steps_per_s == pytest.approx(rate, rel=1e-2)


def test_other_lines() -> None:
    assert last_progress("") == LastProgress()
    log = "step 10/90  loss nan  3.2k steps/s\nstep 20: validation loss 0.5\ninterrupted; the run is saved at step 25."
    found = last_progress(log)
    assert (found.step, found.steps_per_s) == (25, 3200.0)
    assert found.loss is not None
    assert found.loss != found.loss
