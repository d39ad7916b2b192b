"""The devices of this machine, really measured, for a short time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from millrace.cli.main import OK, main
from millrace.errors import PlacementError
from millrace.place import calibrate
from millrace.place.cluster_file import read_cluster
from millrace.place.probe import local_cluster


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
