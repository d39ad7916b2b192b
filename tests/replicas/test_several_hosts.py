"""Members that have no directory in common with the driver or each other, and reach all by TCP."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tests.graph.step_models import step_graph
from tests.replicas.real_session import pid_of, session_over, train, values_of

from millrace.replicas.settings import Hybrid, Sync
from millrace.runtime.launch import ProcessLauncher

HERE = Path(__file__).parent


class FarLauncher(ProcessLauncher):
    """Processes that are told of a directory that they do not have."""

    def __init__(self, directory: Path) -> None:
        super().__init__("millrace.replicas.member", ["--imports", "another_host"], 1, directory)
        self.where = "tcp:127.0.0.1:0"
        self._scratch = directory

    def start(self, name: str, environment: Mapping[str, str]) -> None:
        own = self._scratch / f"host-of-{name}"
        own.mkdir()
        elsewhere = {"MILLRACE_DIRECTORY": "/nonexistent/millrace", "MILLRACE_SCRATCH": str(own)}
        super().start(name, {**environment, **elsewhere})


@pytest.fixture(autouse=True)
def _members_find_another_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)


def sockets_in(session: object) -> list[str]:
    directory = session.launcher._scratch  # type: ignore[attr-defined]
    return [str(path) for path in directory.rglob("*") if path.is_socket()]


def test_collective_replicas_agree_over_tcp() -> None:
    graph = step_graph("mlp", "adamw")
    with session_over(graph, Sync(), 2) as session:
        expected, final = train(session, "numbers", 6), values_of(session)
    with session_over(graph, Sync(), 2, spares=1, launcher_in=FarLauncher) as session:
        found = train(session, "numbers", 3)
        assert len({session._hosts[worker] for worker in session.workers}) == 2
        while len(session.members) < 3:
            time.sleep(0.02)
        os.kill(pid_of(session, session.workers[0]), signal.SIGKILL)
        found += train(session, "numbers", 3, 3)
        assert found == pytest.approx(expected, rel=1e-12)
        for name, value in values_of(session).items():
            torch.testing.assert_close(value, final[name], rtol=1e-12, atol=1e-12)
        assert not sockets_in(session)


def test_servers_and_their_copies_are_reached_over_tcp() -> None:
    graph = step_graph("mlp", "adamw")
    with session_over(graph, Sync(parameter_servers=2), 2) as session:
        expected, final = train(session, "numbers", 6), values_of(session)
    with session_over(graph, Sync(parameter_servers=2), 2, spares=1, launcher_in=FarLauncher) as session:
        found = train(session, "numbers", 3)
        places = session._pool.places
        assert all(place.address.startswith("tcp:127.0.0.1:") for place in places)
        while any(place.copy_state != "following" for place in places):
            session._hear()
        os.kill(pid_of(session, places[0].holder), signal.SIGKILL)
        found += train(session, "numbers", 3, 3)
        assert found == expected
        assert all(torch.equal(value, final[name]) for name, value in values_of(session).items())
        assert not sockets_in(session)


def test_a_group_agrees_over_tcp() -> None:
    graph = step_graph("mlp", "adamw")
    with session_over(graph, Hybrid(groups=1, copies=False), 2) as session:
        expected = train(session, "numbers", 6)
    with session_over(graph, Hybrid(groups=1, copies=False), 2, spares=1, launcher_in=FarLauncher) as session:
        found = train(session, "numbers", 3)
        os.kill(pid_of(session, session._pool.groups["g0"].formed[0]), signal.SIGKILL)
        found += train(session, "numbers", 3, 3)
        assert found == pytest.approx(expected, rel=1e-12)
        assert not sockets_in(session)
