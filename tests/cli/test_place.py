"""`millrace place`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from millrace.cli.main import main

CLUSTER = """
[[device]]
name = "/host:0/gpu:[0-3]"
like = "v100"

[[link]]
source = "*"
target = "*"
latency_s = 1e-5
bytes_per_s = 1e10
"""


def test_a_task_is_placed_on_a_cluster_that_one_does_not_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("four.toml").write_text(CLUSTER)
    small = ["--set", "width=32", "--set", "layers=2", "--set", "batch_size=8"]
    given = ["place", "chars", *small, "--cluster", "four.toml", "--microbatches", "2", "--budget", "0.5"]
    assert main([*given, "--on", "layers.0=gpu:2", "--wire", "int8", "--out", "step.json", "--json"]) == 0
    out = capsys.readouterr().out
    assert "ms a step expected" in out
    found = json.loads(out.strip().splitlines()[-1])
    assert set(found["devices"]) == {f"/host:0/gpu:{i}" for i in range(4)}
    for group, device in found["groups"].items():
        if group.startswith("layers.0"):
            assert device == "/host:0/gpu:2"
    assert all(0 <= device["busy_share"] <= 1 for device in found["devices"].values())
    assert json.loads(Path("step.json").read_text())["traceEvents"]


def test_what_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "none.toml")
    assert main(["place", "digits", "--cluster", missing]) == 1
    assert missing in capsys.readouterr().err
    file = tmp_path / "four.toml"
    file.write_text(CLUSTER)
    assert main(["place", "digits", "--cluster", str(file), "--search", "hefty"]) == 1
    assert "Did you mean 'heft'" in capsys.readouterr().err
    assert main(["place", "digits", "--cluster", str(file), "--on", "gpu:0"]) == 2
    assert "MODULES=DEVICE" in capsys.readouterr().err
    assert main(["place", "digits", "--cluster", str(file), "--on", "nothing=gpu:0"]) == 1
    assert "fits no module path" in capsys.readouterr().err
    assert main(["place", "digits", "--cluster", str(file), "--on", "block1=gpu:7"]) == 1
    assert "gpu:7" in capsys.readouterr().err
    assert main(["place", "digits", "--cluster", str(file), "--microbatches", "0"]) == 2
    assert "--microbatches 0: expected a whole number of at least 1" in capsys.readouterr().err
    nowhere = str(tmp_path / "none" / "step.json")
    assert main(["place", "digits", "--cluster", str(file), "--budget", "0.1", "--out", nowhere]) == 1
    assert "Choose another place" in capsys.readouterr().err


def test_a_short_name_that_two_devices_have_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "two-hosts.toml"
    file.write_text(CLUSTER + CLUSTER.partition("[[link]]")[0].replace("host:0", "host:1"))
    given = ["place", "digits", "--set", "width=4", "--cluster", str(file), "--search", "hints_only"]
    assert main([*given, "--on", "block1=gpu:2"]) == 1
    error = capsys.readouterr().err
    assert "/host:0/gpu:2" in error
    assert "/host:1/gpu:2" in error
    assert main([*given, "--on", "block1=/host:1/gpu:2", "--json"]) == 0
    groups = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["groups"]
    assert {device for group, device in groups.items() if group.startswith("block1")} == {"/host:1/gpu:2"}


def test_blocks_of_layers_are_placed_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "four.toml"
    file.write_text(CLUSTER)
    given = ["place", "digits", "--cluster", str(file), "--partitions", "2", "--budget", "0.3", "--json"]
    assert main(given) == 0
    groups = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["groups"]
    assert any(group.endswith("block 1") for group in groups)
