"""The kept figures of this machine: measured once, again on request or when damaged, and whatever becomes of the file.

The measuring itself is in `test_probe.py`; here it is counted and replaced by given figures.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from millrace.errors import PlacementError
from millrace.place import calibrate
from millrace.place.calibrate import calibration_path, cpu_figures, host_link_figures
from millrace.place.cluster import CLASSES, SPECIAL

VERSION = calibrate._VERSION
FIGURES = {**dict.fromkeys(CLASSES, 1e9), SPECIAL: 5e8, "product.bfloat16": 2e9, "dispatch_s": 1e-6}


class Measuring:
    """Takes the place of the measuring: gives figures that tell which measurement they are of."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, threads: int, beside: Sequence[int], budget_s: float) -> dict[str, float]:
        self.asked.append(threads)
        return {name: value * len(self.asked) for name, value in FIGURES.items()}


@pytest.fixture
def measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measuring:
    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path / "cache"))
    found = Measuring()
    monkeypatch.setattr(calibrate, "_measure", found)
    return found


def test_measured_once_for_each_number_of_threads(measuring: Measuring) -> None:
    assert cpu_figures(1) == cpu_figures(1) == FIGURES
    assert cpu_figures(2) == {name: 2 * value for name, value in FIGURES.items()}
    assert cpu_figures(1) == FIGURES
    assert measuring.asked == [1, 2]


def test_measured_again_on_request_and_then_kept(measuring: Measuring) -> None:
    cpu_figures(1)
    cpu_figures(2)
    again = cpu_figures(1, measure_again=True)
    assert again == {name: 3 * value for name, value in FIGURES.items()} == cpu_figures(1)
    assert cpu_figures(2)["dispatch_s"] == 2e-6  # others stay
    assert measuring.asked == [1, 2, 1]


def test_who_waits_is_told_of_it_and_nobody_else(measuring: Measuring) -> None:
    said: list[str] = []
    cpu_figures(1, [2], say=said.append)
    cpu_figures(1, [2], say=said.append)
    assert said == ["measuring this machine, once: cpu 1 beside 2"]


def without(name: str) -> dict[str, float]:
    return {key: value for key, value in FIGURES.items() if key != name}


@pytest.mark.parametrize(
    "kept",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        json.dumps({"version": VERSION - 1, "cpu 1": FIGURES}).encode(),
        json.dumps({"cpu 1": FIGURES}).encode(),
        *(
            json.dumps({"version": VERSION, "cpu 1": damaged}).encode()
            for damaged in (
                None,
                [1.0],
                {},
                without("memory"),
                without("dispatch_s"),
                {**FIGURES, "product": 0.0},
                {**FIGURES, "product": -1.0},
                {**FIGURES, "product": float("nan")},
                {**FIGURES, "product": float("inf")},
                {**FIGURES, "product": "fast"},
                {**FIGURES, "product": True},
                {**FIGURES, "more": None},
            )
        ),
    ],
)
def test_a_damaged_file_is_measured_anew_and_mended(kept: bytes, measuring: Measuring) -> None:
    calibration_path().parent.mkdir()
    calibration_path().write_bytes(kept)
    assert cpu_figures(1) == FIGURES
    assert measuring.asked == [1]
    assert json.loads(calibration_path().read_text())["cpu 1"] == FIGURES
    assert cpu_figures(1) == FIGURES
    assert measuring.asked == [1]


def test_what_is_good_in_a_file_stays_beside_what_is_damaged(measuring: Measuring) -> None:
    calibration_path().parent.mkdir()
    good = {name: 7 * value for name, value in FIGURES.items()}
    calibration_path().write_text(json.dumps({"version": VERSION, "cpu 4": good, "cpu 1": {"product": -1.0}}))
    cpu_figures(1)
    assert cpu_figures(4) == good
    assert measuring.asked == [1]


def test_a_place_that_cannot_be_written_is_told_and_measured_again(
    measuring: Measuring, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the directory would be")
    with caplog.at_level(logging.WARNING, "millrace"):
        assert cpu_figures(1) == FIGURES
    assert str(calibration_path()) in caplog.text
    assert "the next start measures again" in caplog.text
    cpu_figures(1)
    assert measuring.asked == [1, 1]


def test_figures_belong_to_a_processor_and_a_version_of_torch(
    measuring: Measuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu_figures(1)
    first = calibration_path()
    monkeypatch.setattr(calibrate, "_processor", lambda: "another")
    assert calibration_path() != first
    cpu_figures(1)
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert calibration_path().parent == first.parent
    cpu_figures(1)
    assert measuring.asked == [1, 1, 1]


def test_several_at_once_leave_a_whole_file(measuring: Measuring) -> None:
    threads = [threading.Thread(target=cpu_figures, args=(n,)) for n in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept: dict[str, Any] = json.loads(calibration_path().read_text())
    assert kept["version"] == VERSION
    assert [p.name for p in calibration_path().parent.iterdir()] == [calibration_path().name]


def test_the_link_is_kept_beside_the_devices(measuring: Measuring, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([{"latency_s": 1e-5, "bytes_per_s": 1e9}, {"latency_s": 2e-5, "bytes_per_s": 2e9}])
    monkeypatch.setattr(calibrate, "measure_host_link", lambda: next(answers))
    cpu_figures(1)
    assert host_link_figures() == host_link_figures() == {"latency_s": 1e-5, "bytes_per_s": 1e9}
    assert host_link_figures(measure_again=True)["bytes_per_s"] == 2e9
    assert cpu_figures(1) == FIGURES
    assert measuring.asked == [1]


def test_a_worker_beside_others_is_measured_and_kept_apart(measuring: Measuring) -> None:
    cpu_figures(1)
    assert cpu_figures(1, [2, 1])["dispatch_s"] == 2e-6
    assert cpu_figures(1, [1, 2])["dispatch_s"] == 2e-6  # the same company
    assert cpu_figures(1, [1])["dispatch_s"] == 3e-6
    assert cpu_figures(1) == FIGURES
    assert measuring.asked == [1, 1, 1]


def test_figures_are_means_over_the_workers_that_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, answers = threading.Lock(), iter([1.0, 3.0])

    def measure(threads: int, budget_s: float) -> dict[str, float]:
        with lock:
            return {"product": next(answers) if threads == 1 else 100.0}

    monkeypatch.setattr(calibrate, "_measure_worker", measure)
    assert calibrate._measure(1, [2, 1], 0.1) == {"product": 2.0}
    assert calibrate._measure(2, [], 0.1) == {"product": 100.0}


def test_a_worker_that_fails_is_named_with_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path))
    with pytest.raises(PlacementError, match=r"measuring a CPU worker \(0 threads\) ended with status 1: .*threads"):
        calibrate._measure_worker(0, 0.1)
