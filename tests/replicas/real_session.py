"""Sessions over real processes of this machine, for tests."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.graph.step_models import batch_of
from torch import Tensor

from millrace.graph.graph import TRAIN, Graph
from millrace.replicas.hub import Hub
from millrace.replicas.hybrid_session import HybridSession
from millrace.replicas.members_session import MembersSession
from millrace.replicas.rendezvous import Rendezvous
from millrace.replicas.server_session import ServerSession
from millrace.replicas.session import ReplicatedSession
from millrace.replicas.settings import Hybrid, LocalSteps, Update
from millrace.runtime.launch import Launcher, ProcessLauncher
from millrace.runtime.session import Session

EXAMPLES = 7  # do not divide by 2 or 3


def _processes(directory: Path) -> Launcher:
    return ProcessLauncher("millrace.replicas.member", [], 1, directory)


def _processes_with_devices(directory: Path) -> Launcher:
    return ProcessLauncher("millrace.replicas.member", ["--divided"], 1, directory)


def mortals_in(directory: Path) -> Launcher:
    """Starts members one of which dies where `dies_in_update` says."""
    return ProcessLauncher("millrace.replicas.member", ["--imports", "tests.replicas.dies_in_update"], 1, directory)


@contextlib.contextmanager
def session_over(
    graph: Graph,
    update: Update,
    replicas: int,
    *,
    spares: int = 0,
    launcher_in: Callable[[Path], Launcher] | None = None,
    **settings: Any,
) -> Iterator[Any]:
    """A session. When it is closed no process of it is left, and nothing in its directory."""
    directory = tempfile.TemporaryDirectory(prefix="millrace-")
    launcher_in = launcher_in or (_processes_with_devices if settings.get("devices") else _processes)
    launcher = launcher_in(Path(directory.name))
    hub = Hub(launcher, secrets.token_bytes(32), Path(directory.name), print)
    given = {
        "replicas": replicas,
        "spares": spares,
        "variables": {name: value.detach().clone() for name, value in graph.initial.items()},
        "compile": "eager",
        "directory": directory,
        **settings,
    }
    session: MembersSession
    if isinstance(update, LocalSteps) or not update.parameter_servers:
        local = update if isinstance(update, LocalSteps) else None
        session = ReplicatedSession(graph, hub, Rendezvous(), local=local, **given)
    elif isinstance(update, Hybrid):
        session = HybridSession(graph, hub, Rendezvous(), update, **given)
    else:
        session = ServerSession(graph, hub, update, **given)
    with session:
        session.launcher = launcher  # type: ignore[attr-defined]
        yield session
    assert not Path(directory.name).exists()
    for pid in launcher.pids.values():  # type: ignore[attr-defined]
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def pid_of(session: Any, member: str) -> int:
    """The process of a member."""
    return int(session.launcher.pids[member])


def train(session: Session | MembersSession, kind: str, steps: int, first: int = 0) -> list[float]:
    """The losses of steps on batches of random numbers."""
    losses = []
    for step in range(first, first + steps):
        losses.append(float(session.run([TRAIN, "loss"], batch_of(kind, EXAMPLES, step))[1]))
    return losses


def values_of(session: Session | MembersSession) -> dict[str, Tensor]:
    """Copies of all variables."""
    return {name: value.clone() for name, value in session.variables.items()}
