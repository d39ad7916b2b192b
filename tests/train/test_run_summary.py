"""A run in one line, from what it has written so far."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.train.metrics_log import Record
from millrace.train.run_directory import RunDirectory
from millrace.train.run_summary import steps_per_s, summarize


@given(st.floats(0.01, 1e4), st.integers(1, 50), st.integers(2, 40))
def test_an_even_run_has_its_rate(rate: float, every: int, count: int) -> None:
    records: list[Record] = []
    for n in range(count):
        records.append({"step": n * every, "time_s": 1e6 + n * every / rate, "loss": 1.0})
        records.append({"step": n * every, "time_s": 1e6 + n * every / rate, "validation/loss": 1.0})
    assert steps_per_s(records) == pytest.approx(rate, rel=1e-2)


def test_no_rate_from_too_little() -> None:
    assert steps_per_s([]) is None
    assert steps_per_s([{"step": 1, "time_s": 1.0, "loss": 1.0}]) is None
    assert steps_per_s([{"step": s, "time_s": 1.0, "loss": 1.0} for s in (1, 2)]) is None


def test_a_run_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path, "run") as run:
        first = summarize(run)
        assert (first.status, first.step, first.loss, first.steps_per_s) == ("running", 0, None, None)
        for step in range(10, 20_000, 10):  # more than is read of the file
            run.log(step, {"loss": 1 / step, "accuracy": 0.5})
            if step == 19_980:
                time.sleep(0.01)
        run.log(19_990, {"validation/loss": 0.25})
        now = summarize(RunDirectory.open(tmp_path / "run"))
        assert (now.status, now.step, now.loss) == ("running", 19_990, 1 / 19_990)
        assert now.steps_per_s is not None
        assert now.steps_per_s > 0
        assert abs(now.updated_s - time.time()) < 60
        run.close("interrupted", 19_990)
    assert summarize(RunDirectory.open(tmp_path / "run")).status == "interrupted"


def test_the_rate_of_a_resumed_run_is_that_of_now(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path, "run") as run:
        run.log(10, {"loss": 1.0})
    time.sleep(0.01)
    with RunDirectory.create(tmp_path, "run", exist="resume") as run:
        assert summarize(run).steps_per_s is None
        assert summarize(run).loss == 1.0
