"""A link between two machines that is taken down: network namespaces joined by a pair of virtual interfaces."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.graph.step_models import step_graph
from tests.replicas.another_network import NAMESPACE
from tests.replicas.real_session import session_over, train, values_of

from millrace.replicas.hub import Hub
from millrace.replicas.rendezvous import Rendezvous
from millrace.replicas.server_session import ServerSession
from millrace.replicas.session import ReplicatedSession
from millrace.replicas.settings import Sync
from millrace.runtime.launch import ProcessLauncher

HERE = Path(__file__).parent
NOTICED_S = 2.0
GHOSTS_END_S = 8.0  # a cut connection is given up after 5 s


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)


class Wire:
    """A network namespace, and the link to it. near, far: the addresses of its ends."""

    def __init__(self) -> None:
        number = os.getpid() % 50000
        self.namespace, self._near, self._far = f"mr{number}", f"mra{number}", f"mrb{number}"
        net = f"10.{200 + number // 65536 % 50}.{number // 256 % 256}"
        low = number % 63 * 4
        self.near, self.far = f"{net}.{low + 1}", f"{net}.{low + 2}"

    def __enter__(self) -> Wire:
        ip("netns", "add", self.namespace)
        ip("link", "add", self._near, "type", "veth", "peer", "name", self._far, "netns", self.namespace)
        ip("addr", "add", f"{self.near}/30", "dev", self._near)
        ip("-n", self.namespace, "addr", "add", f"{self.far}/30", "dev", self._far)
        ip("-n", self.namespace, "link", "set", "lo", "up")
        ip("-n", self.namespace, "link", "set", self._far, "up")
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        for command in (("link", "del", self._near), ("netns", "del", self.namespace)):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip(*command)

    def up(self) -> None:
        ip("link", "set", self._near, "up")

    def down(self) -> None:
        ip("link", "set", self._near, "down")


class TwoHosts(ProcessLauncher):
    """Members of which some are at the far end of a wire, where nobody can end them while it is cut."""

    def __init__(self, wire: Wire, far: set[str], directory: Path) -> None:
        super().__init__("millrace.replicas.member", ["--imports", "another_network"], 1, directory)
        self.where = f"tcp:{wire.near}:0"
        self.is_cut = False
        self._wire, self._far, self._scratch = wire, far, directory

    def start(self, name: str, environment: Mapping[str, str]) -> None:
        own = self._scratch / f"host-of-{name}"
        own.mkdir()
        elsewhere = {"MILLRACE_DIRECTORY": "/nonexistent/millrace", "MILLRACE_SCRATCH": str(own)}
        namespace = {NAMESPACE: self._wire.namespace} if name in self._far else {}
        super().start(name, {**environment, **elsewhere, **namespace})

    def kill(self, name: str) -> None:
        if not (self.is_cut and name in self._far):
            super().kill(name)

    def exit_of(self, name: str) -> str | None:
        return None if self.is_cut and name in self._far else super().exit_of(name)


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root, and the command `ip` (iproute2)")
    monkeypatch.syspath_prepend(HERE)
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(Wire())
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        yield found


@contextlib.contextmanager
def over(wire: Wire, update: Sync, far: set[str]) -> Iterator[tuple[Any, TwoHosts]]:
    graph = step_graph("mlp", "adamw")
    directory = tempfile.TemporaryDirectory(prefix="millrace-")
    launcher = TwoHosts(wire, far, Path(directory.name))
    hub = Hub(launcher, secrets.token_bytes(32), Path(directory.name), print)
    given: dict[str, Any] = {"replicas": 2, "spares": 0, "compile": "eager", "directory": directory}
    given["variables"] = {name: value.detach().clone() for name, value in graph.initial.items()}
    session: Any
    if update.parameter_servers:
        session = ServerSession(graph, hub, update, **given)
    else:
        session = ReplicatedSession(graph, hub, Rendezvous(wire.near), **given)
    with session:
        yield session, launcher


def until(session: Any, done: Callable[[], bool], within_s: float) -> float:
    """Let the session hear its members until something is so. Returns: seconds that it took."""
    began_s = time.monotonic()
    while not done():
        assert time.monotonic() - began_s < within_s
        session._hear(0.01)
    return time.monotonic() - began_s


def lives(pid: int) -> bool:
    """Whether a process has not ended (it may be a zombie then)."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize(("update", "far"), [(Sync(), "m1"), (Sync(parameter_servers=1), "m3")])
@pytest.mark.parametrize(
    "ghost_lives",
    [
        pytest.param(False, id="cut for long", marks=pytest.mark.long),
        pytest.param(True, id="back while the ghost lives"),
    ],
)
def test_a_cut_link_costs_the_step_in_flight_and_lets_no_ghost_write(
    wire: Wire, update: Sync, far: str, ghost_lives: bool
) -> None:
    with session_over(step_graph("mlp", "adamw"), update, 2) as session:
        expected, final = train(session, "numbers", 12), values_of(session)
    with over(wire, update, {far}) as (session, launcher):
        found = train(session, "numbers", 4)
        until(session, lambda: session.complete, 30.0)
        assert session._hosts[far].startswith(f"{wire.namespace} ")
        pid = launcher.pids[far]
        launcher.is_cut = True
        wire.down()
        cut_s = time.monotonic()
        until(session, lambda: far not in session.members, NOTICED_S)
        noticed_s = time.monotonic() - cut_s
        found += train(session, "numbers", 4, len(found))
        next_s = time.monotonic() - cut_s
        if ghost_lives:
            assert lives(pid)
            wire.up()
        found += train(session, "numbers", 2, len(found))
        while lives(pid):
            assert time.monotonic() - cut_s < GHOSTS_END_S
            time.sleep(0.02)
        ended_s = time.monotonic() - cut_s
        launcher.is_cut = False
        wire.up()
        found += train(session, "numbers", 2, len(found))
        after = values_of(session)
        print(f"{update}: noticed {noticed_s:.2f} s, 4 steps {next_s:.2f} s, ghost ended {ended_s:.2f} s after the cut")
    assert found == pytest.approx(expected, rel=1e-12)
    for name, value in final.items():
        torch.testing.assert_close(after[name], value, rtol=1e-12, atol=1e-12)
