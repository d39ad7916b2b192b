"""The devices of this machine, really measured, for a short time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from millrace.cli.main import OK, main
from millrace.errors import PlacementError
from millrace.place import calibrate
from millrace.place.cluster import Cluster
from millrace.place.cluster_file import read_cluster
from millrace.place.probe import chosen_devices, local_cluster, local_links


@pytest.mark.long
def test_measured_once_and_again_when_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path))
    cluster = local_cluster([1, 1], budget_s=0.1)
    assert [d.name for d in cluster.devices] == ["/host:0/cpu:0", "/host:0/cpu:1"]
    assert cluster.link("/host:0/cpu:0", "/host:0/cpu:1").bytes_per_s > 0
    assert local_cluster([1, 1]) == cluster  # kept
    for damaged in ("{", "[]", '{"version": 4, "cpu 1": {"product": -1.0}}'):
        calibrate.calibration_path().write_text(damaged)
        again = local_cluster([1, 1], budget_s=0.1)
        assert all(rate > 0 for device in again.devices for rate in device.rates.values())
        kept = json.loads(calibrate.calibration_path().read_text())
        assert kept["cpu 1"] == {**again.devices[0].rates, "dispatch_s": again.devices[0].dispatch_s}
    file = tmp_path / "here.toml"
    assert main(["devices", "--write", str(file)]) == OK
    assert main(["devices", "--cluster", str(file), "--json"]) == OK
    assert read_cluster(file) == local_cluster()


@pytest.mark.parametrize("devices", [0, -1, [], [0]])
def test_no_device_or_no_thread_is_refused(devices: int | list[int]) -> None:
    with pytest.raises(PlacementError, match="expected how many"):
        local_cluster(devices)


def cpu(*threads: int) -> dict[str, int]:
    return {f"/host:0/cpu:{index}": count for index, count in enumerate(threads)}


def gpu(*numbers: int) -> list[str]:
    return [f"/host:0/gpu:{number}" for number in numbers]


def test_what_a_user_may_call_the_devices() -> None:
    """On a machine of 16 cores and 3 GPUs, whose workers get a core each."""
    for wanted in (None, "all", ["gpu", "cpu"], ["cpu:0", "gpu:0", "/host:0/gpu:1", "gpu:2"]):
        assert chosen_devices(wanted, 16, 3) == (cpu(13), gpu(0, 1, 2)), wanted
    assert chosen_devices(["gpu:2", "cpu:0", "cpu:1"], 16, 3) == (cpu(7, 7), gpu(2))
    assert chosen_devices("gpu:1", 16, 3) == ({}, gpu(1))
    assert chosen_devices("all", 2, 3) == (cpu(1), gpu(0, 1, 2))
    assert chosen_devices("all", 4, 0) == (cpu(4), [])
    assert chosen_devices(2, 16, 3) == chosen_devices(["cpu:0", "cpu:1"], 16, 3) == (cpu(8, 8), [])
    assert chosen_devices([3, 1], 16, 3) == (cpu(3, 1), [])


@pytest.mark.parametrize(
    ("wanted", "gpus", "said"),
    [
        (["gpu:0"], 0, "no GPU that PyTorch can use"),
        (["gpu", "cpu"], 0, "has no 'gpu'"),
        (["gpu:3"], 3, "It has gpu:0, gpu:1, gpu:2"),
        (["cuda:0"], 1, "It has gpu:0.* or 'gpu:0'"),
        (["/host:1/gpu:0"], 1, "has no '/host:1/gpu:0'"),
        (["gpu:0", "gpu"], 1, "names gpu:0 twice"),
        (["gpu:0", 1], 1, "expected how many"),
        ("", 1, "has no ''"),
    ],
)
def test_devices_that_are_not_there_are_refused(wanted: Any, gpus: int, said: str) -> None:
    with pytest.raises(PlacementError, match=said):
        chosen_devices(wanted, 4, gpus)


def test_between_two_gpus_tensors_go_through_the_host() -> None:
    one, two = gpu(0, 1)
    ways = {one: {"latency_s": 1e-5, "bytes_per_s": 1e10}, two: {"latency_s": 2e-5, "bytes_per_s": 5e9}}
    cluster = Cluster((), local_links(ways, {"latency_s": 1e-6, "bytes_per_s": 2e10}))
    assert cluster.link(one, two).latency_s == cluster.link(two, one).latency_s == pytest.approx(3e-5)
    assert cluster.link(one, two).bytes_per_s == pytest.approx(1e10 / 3)
    assert cluster.link("/host:0/cpu:0", two).bytes_per_s == cluster.link(two, "/host:0/cpu:0").bytes_per_s == 5e9
    assert cluster.link("/host:0/cpu:0", "/host:0/cpu:1").bytes_per_s == 2e10


@pytest.mark.gpu
def test_gpus_are_found_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path))
    cluster = local_cluster("all", budget_s=0.5)
    assert [d.kind for d in cluster.devices] == ["cpu"] + ["cuda"] * (len(cluster.devices) - 1)
    card = cluster.device("gpu:0")
    assert card.memory_bytes > 1 << 30
    assert card.rates["product"] > cluster.device("cpu:0").rates["product"]
    assert cluster.link("/host:0/cpu:0", card.name).bytes_per_s > 1e8
    assert local_cluster("all") == cluster  # kept
