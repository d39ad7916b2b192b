"""Transports between real processes, and what the others notice when one of them is killed or stopped."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.runtime import transport_peer

KINDS = ["shared_memory", "gloo"]
PROGRAM = Path(transport_peer.__file__)
SEED, EDGES = 5, 30


class Process:
    """A `transport_peer.py`, and calls to it."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.program = subprocess.Popen(
            [sys.executable, str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, call: str, **arguments: Any) -> None:
        assert self.program.stdin is not None
        self.program.stdin.write(json.dumps({"call": call, **arguments}) + "\n")
        self.program.stdin.flush()

    def hear(self, limit_s: float = 60.0) -> dict[str, Any]:
        assert self.program.stdout is not None
        assert select.select([self.program.stdout], [], [], limit_s)[0], f"no answer from {self.device}"
        heard: dict[str, Any] = json.loads(self.program.stdout.readline())
        return heard

    def signal(self, number: signal.Signals) -> None:
        self.program.send_signal(number)
        if number == signal.SIGKILL:
            self.program.wait()

    def end(self) -> int | None:
        """The exit status after its input has ended; killed if it does not."""
        assert self.program.stdin is not None
        self.program.stdin.close()
        try:
            return self.program.wait(timeout=20.0)
        except subprocess.TimeoutExpired:
            self.program.kill()
            self.program.wait()
            return None


class Group:
    """Three of them, connected anew for each test that they survive."""

    def __init__(self) -> None:
        self.processes = [Process(name) for name in transport_peer.devices(3)]
        self.edges = transport_peer.edges(SEED, transport_peer.devices(3), EDGES)

    def all(self, call: str, **arguments: Any) -> list[Any]:
        for process in self.processes:
            process.ask(call, **arguments)
        return [process.hear()["answer"] for process in self.processes]

    def connect(self, kind: str, place: Path) -> None:
        for process in self.processes:
            process.ask(
                "connect", kind=kind, device=process.device, count=3, seed=SEED, edge_count=EDGES, place=str(place)
            )
        assert [process.hear()["answer"] for process in self.processes] == ["connected"] * 3

    def replace(self, number: int) -> None:
        self.processes[number] = Process(self.processes[number].device)

    def from_to(self, source: int, target: int) -> int:
        """The number of an edge between two of them."""
        names = transport_peer.devices(3)
        return next(e.number for e in self.edges if (e.source, e.target) == (names[source], names[target]))


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    found = Group()
    yield found
    ends = [process.end() for process in found.processes]
    assert ends == [0, 0, 0], "a worker did not end by itself, or with an error"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    found = tmp_path / "place"
    found.mkdir(mode=0o700)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_steps_between_processes(kind: str, group: Group, place: Path) -> None:
    group.connect(kind, place)
    for number in range(5):
        assert sum(group.all("step", number=number)) == EDGES
    group.all("close")


@pytest.mark.parametrize("kind", KINDS)
def test_who_waits_for_a_killed_worker_hears_of_it_at_once(kind: str, group: Group, place: Path) -> None:
    waiting, victim = group.processes[0], group.processes[2]
    group.connect(kind, place)
    group.all("step", number=0)
    group.all("begin", number=1)
    waiting.ask("recv", edge=group.from_to(2, 0), timeout_s=600.0)
    victim.signal(signal.SIGKILL)
    heard = waiting.hear(limit_s=5.0)
    group.replace(2)
    assert heard["error"] == "WorkerError"
    assert f"{waiting.device}: the connection with {victim.device}" in heard["message"]
    for survivor in group.processes[:2]:
        survivor.ask("close")
        assert survivor.hear()["answer"] == "closed"


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_worker_is_noticed_before_the_next_step_is_done(kind: str, group: Group, place: Path) -> None:
    group.connect(kind, place)
    group.all("step", number=0)
    group.processes[1].signal(signal.SIGKILL)
    for survivor in (group.processes[0], group.processes[2]):
        survivor.ask("step", number=1, timeout_s=600.0)
    heard = [group.processes[n].hear(limit_s=10.0) for n in (0, 2)]
    assert [answer["error"] for answer in heard] == ["WorkerError"] * 2
    assert all("/host:0/cpu:1" in answer["message"] for answer in heard)
    group.replace(1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_worker_costs_the_time_allowed_and_no_more(kind: str, group: Group, place: Path) -> None:
    waiting, stopped = group.processes[0], group.processes[1]
    group.connect(kind, place)
    group.all("begin", number=0)
    stopped.signal(signal.SIGSTOP)
    try:
        waiting.ask("recv", edge=group.from_to(1, 0), timeout_s=0.5)
        heard = waiting.hear()
        waiting.ask("close")
        assert waiting.hear()["answer"] == "closed"
    finally:
        stopped.signal(signal.SIGCONT)
    assert heard["error"] == "WorkerError"
    assert f"{waiting.device} waited 0.5 s in step 0" in heard["message"]
    assert stopped.device in heard["message"]


def test_nothing_is_left_after_all_are_killed(group: Group, place: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    group.connect("shared_memory", place)
    group.all("step", number=0)
    assert all("memfd:millrace" in maps for maps in group.all("maps"))
    for number in range(3):
        group.processes[number].signal(signal.SIGKILL)
        group.replace(number)
    assert set(os.listdir("/dev/shm")) <= before
    assert list(place.iterdir()) == []
