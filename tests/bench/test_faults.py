"""The bench of faults, and the soak: one fault, and some seconds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bench import faults, soak


@pytest.mark.long
@pytest.mark.parametrize(("session", "kind"), [("collective", "user code raises"), ("async", "shard killed")])
def test_a_fault_is_noticed_and_its_cost_told(
    session: str, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])  # members import the operator from there
    assert faults.main(["--sessions", session, "--kinds", kind, "--faults", "1", "--replicas", "2"]) == 0
    (line,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert line["name"] == f"faults, {session}, {kind}"
    assert 0 < line["noticed_s"]["max"] <= line["next_step_s"]["max"]
    assert line["goodput"]["median"] > 0
    assert line["step_ms"] > 0


@pytest.mark.long
def test_a_short_soak_leaves_nothing_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.main(["--update", "servers", "--seconds", "12", "--every", "2"]) == 0
    (line,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert sum(line["faults"].values()) >= 4
    assert line["steps"] > 50
    assert not any(line["left"].values())


def test_descendants_are_found_by_their_parents() -> None:
    child = os.fork()
    if child == 0:
        os.read(os.pipe()[0], 1)
        os._exit(0)
    try:
        assert child in soak.descendants()
        assert os.getpid() not in soak.descendants()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert child not in soak.descendants()
