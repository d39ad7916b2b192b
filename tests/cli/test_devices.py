"""`millrace devices`: what it lists, writes, measures and refuses. (Really measured in tests/place/test_probe.py.)"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from millrace.cli.main import FAILED, OK, USAGE, main
from millrace.place import calibrate
from millrace.place.cluster import CLASSES, SPECIAL
from millrace.place.cluster_file import read_cluster

CLUSTER = """
[[device]]
name = "/host:0/gpu:[0-1]"
like = "t4"

[[device]]
name = "/host:1/cpu:0"
kind = "cpu"
memory_bytes = 68719476736
threads = 8
dispatch_s = 5e-6
rates = { product = 4e11, convolution = 3e11, attention = 2e11, memory = 2e10 }

[[link]]
source = "/host:0/*"
target = "/host:0/*"
latency_s = 5e-6
bytes_per_s = 2e11

[[link]]
source = "*"
target = "*"
latency_s = 1e-5
bytes_per_s = 1.2e10
shared = true
"""
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An empty cache, no GPU, and given figures: the list gets a number of threads for every measurement."""
    asked: list[int] = []

    def measure(threads: int, beside: Sequence[int], budget_s: float) -> dict[str, float]:
        asked.append(threads)
        return {**dict.fromkeys(CLASSES, 1e9 * len(asked)), SPECIAL: 1e9, "product.bfloat16": 1e9, "dispatch_s": 2e-6}

    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibrate, "_measure", measure)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    return asked


def test_a_cluster_file_is_shown_with_units(in_tmp: Path, capsys: Captured) -> None:
    (in_tmp / "mine.toml").write_text(CLUSTER)
    assert main(["devices", "--cluster", "mine.toml"]) == OK
    devices, links = capsys.readouterr().out.split("\n\n")
    rows = {line.split()[0]: line for line in devices.splitlines()}
    assert list(rows) == ["device", "/host:0/gpu:0", "/host:0/gpu:1", "/host:1/cpu:0"]
    for cell in ("cpu", "64.0 GiB", " 8 ", "400 Gflop/s", "300 Gflop/s", "200 Gflop/s", "20 GB/s", "5.0 us"):
        assert cell in rows["/host:1/cpu:0"]
    assert "cuda" in rows["/host:0/gpu:0"]
    first, second = links.splitlines()[1:]
    assert first.split() == ["/host:0/*", "/host:0/*", "5.0", "us", "200", "GB/s", "no", "free"]
    assert second.split() == ["*", "*", "10.0", "us", "12", "GB/s", "yes", "free"]


def test_what_is_written_is_the_same_cluster(in_tmp: Path, capsys: Captured) -> None:
    (in_tmp / "mine.toml").write_text(CLUSTER)
    assert main(["devices", "--cluster", "mine.toml", "--write", "copy.toml", "--json"]) == OK
    out = capsys.readouterr().out
    assert "copy.toml: the cluster" in out
    assert read_cluster(Path("copy.toml")) == read_cluster(Path("mine.toml"))
    values: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert [device["name"] for device in values["devices"]] == ["/host:0/gpu:0", "/host:0/gpu:1", "/host:1/cpu:0"]
    assert values["links"][1]["shared"] is True


def test_this_machine_is_measured_once_and_again_on_request(measured: list[int], capsys: Captured) -> None:
    for more, times in ([], 1), ([], 1), (["--measure-again"], 2), ([], 2):
        assert main(["devices", *more, "--json"]) == OK
        values = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert len(measured) == times
        (device,) = values["devices"]
        assert (device["name"], device["kind"]) == ("/host:0/cpu:0", "cpu")
        assert device["rates"]["product"] == 1e9 * times
        assert device["dispatch_s"] == 2e-6
        assert device["threads"] == measured[-1]


def test_a_file_for_this_machine_needs_no_measuring_any_more(
    measured: list[int], in_tmp: Path, capsys: Captured
) -> None:
    assert main(["devices", "--write", "here.toml"]) == OK
    first = capsys.readouterr().out.splitlines()[:2]
    measured.clear()
    assert main(["devices", "--cluster", "here.toml"]) == OK
    assert capsys.readouterr().out.splitlines() == first
    assert measured == []


def test_what_it_refuses(in_tmp: Path, capsys: Captured) -> None:
    (in_tmp / "mine.toml").write_text(CLUSTER)
    assert main(["devices", "--cluster", "none.toml"]) == FAILED
    assert "cannot read the cluster file none.toml" in capsys.readouterr().err
    assert main(["devices", "--cluster", "mine.toml", "--write", "none/copy.toml"]) == FAILED
    assert "cannot write none/copy.toml" in capsys.readouterr().err
    (in_tmp / "bad.toml").write_text(CLUSTER.replace('"cpu"', '"tpu"'))
    assert main(["devices", "--cluster", "bad.toml"]) == FAILED
    assert 'expected "cpu" or "cuda", got \'tpu\'' in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["devices", "--clustr", "mine.toml"])
    assert ended.value.code == USAGE
