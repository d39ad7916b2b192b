"""`millrace graph --placed` and `millrace train --cluster`: digits on two devices, from the command line to files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from millrace.cli.main import FAILED, OK, USAGE, main

CLUSTER = """
[[device]]
name = "/host:0/cpu:[0-1]"
kind = "cpu"
memory_bytes = 4294967296
threads = 1
dispatch_s = 5e-6
rates = { product = 4e10, convolution = 3e10, attention = 2e10, memory = 5e9 }

[[link]]
source = "*"
target = "*"
latency_s = 1e-5
bytes_per_s = 5e9
"""
SMALL = ["--set", "width=4"]
WISHES = ["--on", "block1=cpu:1", "--on", "readout=cpu:0"]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def two(in_tmp: Path) -> list[str]:
    (in_tmp / "two.toml").write_text(CLUSTER)
    return ["--cluster", "two.toml"]


def test_a_placed_graph_as_a_picture_and_for_tensorboard(two: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    given = ["graph", "digits", *SMALL, "--placed", *two, *WISHES, "--budget", "0.3", "--microbatches", "2"]
    assert main([*given, "--out", "step.svg", "--tensorboard", "events"]) == OK
    out = capsys.readouterr().out
    assert "step.svg: " in out
    assert "tensorboard --logdir events" in out
    fills = {}
    svg = ElementTree.parse("step.svg").getroot()
    for group in svg.iter(f"{SVG}g"):
        rectangle, name = group.find(f"{SVG}rect"), group.find(f"{SVG}text")
        assert rectangle is not None
        assert name is not None
        fills.setdefault(str(name.text), set()).add(rectangle.get("fill"))
    (first,), (last,) = fills["block1.convolution"], fills["readout"]
    assert first != last
    assert fills["block1.relu"] == {first}
    texts = {element.text for element in svg.iter(f"{SVG}text")}
    assert {"/host:0/cpu:0", "/host:0/cpu:1", "between devices"} <= texts
    assert any("of 2 microbatches" in (text or "") for text in texts)
    nodes = EventAccumulator("events").Reload().Graph().node
    for node in nodes:
        if node.name.startswith(("block1/", "backward/block1/")) and "/recv_" not in node.name:
            assert node.device == "/host:0/device:CPU:1"
        if node.name.startswith("readout/") and "/recv_" not in node.name:
            assert node.device == "/host:0/device:CPU:0"


def test_a_graph_without_devices_for_tensorboard(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "digits", *SMALL, "--tensorboard", "events"]) == OK
    assert {node.device for node in EventAccumulator("events").Reload().Graph().node} <= {"", "/device:CPU:0"}
    assert "convolution" not in capsys.readouterr().out  # nothing but where it is


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("graph digits --placed --devices 2", "--placed is for pictures"),
        ("graph digits --placed --devices 2 --out step.txt", "--placed is for pictures"),
        ("graph digits --placed --out step.svg", "--devices N"),
        ("graph digits --microbatches 2 --out step.svg", "--microbatches is for --placed"),
        ("train digits --microbatches 2", "are for several devices"),
        ("train digits --on block1=cpu:0", "are for several devices"),
        ("train digits --devices 2 --cluster two.toml", "give one of the two"),
    ],
)
def test_wrong_usage(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == USAGE
    assert message in " ".join(capsys.readouterr().err.split())


def test_wrong_values(two: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    given = ["graph", "digits", *SMALL, "--placed", *two, "--out", "step.svg"]
    assert main([*given, "--partitions", "0"]) == USAGE
    assert "--partitions 0: expected a whole number" in capsys.readouterr().err
    assert main([*given, "--on", "nothing=cpu:0"]) == FAILED
    assert "fits no module path" in capsys.readouterr().err
    assert main(["train", "digits", "--devices", "0"]) == USAGE
    assert "devices=0" in capsys.readouterr().err
    assert not Path("step.svg").exists()
    assert not Path("runs").exists()


def events_of(path: Path, kind: str) -> list[list[tuple[str, str]]]:
    """Of each process in a trace: the rows and names of its spans of one kind."""
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    rows = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    chosen = [e for e in events if e["ph"] == "X" and e["cat"] == kind]
    return [sorted((rows[p, e["tid"]], e["name"]) for e in chosen if e["pid"] == p) for p in (0, 1)]


def test_training_over_two_devices_leaves_what_they_did(two: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--set", "steps=22", "--set", "compile=eager", "--set", "batch_size=16", "--quiet", "--json"]
    dividing = [*two, *WISHES, "--microbatches", "2"]
    assert main(["train", "digits", *SMALL, *quick, *dividing, "--run-dir", "run"]) == OK
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1])["steps"] == 22
    assert "timeline.json, to be opened at ui.perfetto.dev" in out
    groups = json.loads(Path("run/placement.json").read_text())["groups"]
    first = {device for group, device in groups.items() if group.startswith("block1")}
    assert first == {"/host:0/cpu:1"}
    titles = [
        event["args"]["name"]
        for event in json.loads(Path("run/timeline.json").read_text())["traceEvents"]
        if event["name"] == "process_name"
    ]
    assert titles == ["expected (eager)", "measured: step 20 (eager)"]
    for kind in ("task", "transfer"):
        expected, measured = events_of(Path("run/timeline.json"), kind)
        assert expected == measured != []
    devices = {node.device for node in EventAccumulator("run/events").Reload().Graph().node}
    assert devices == {"", "/host:0/device:CPU:0", "/host:0/device:CPU:1"}
    assert main(["train", "--resume", "run", "--quiet", "--set", "steps=24", *dividing]) == OK
    assert "2 steps after the first 22" in capsys.readouterr().out
