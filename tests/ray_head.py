"""A Ray that somebody has started on this machine, and the processes below this one."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

START_S = 90.0


@dataclass(frozen=True)
class Head:
    """Where it listens; dashboard is "" where it has none. environment: for whoever wants to use it."""

    address: str
    dashboard: str
    environment: Mapping[str, str]


def processes() -> dict[int, str]:
    """What runs below this process, at any depth, zombies apart."""
    found: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(entry.name)] = (int(parent), (entry / "cmdline").read_text())
    below: dict[int, str] = {}
    for pid, (parent, command) in found.items():
        while parent not in (os.getpid(), 0, 1) and parent in found:
            parent = found[parent][0]
        if parent == os.getpid():
            below[pid] = command
    return below


def until(true: Callable[[], object], within_s: float) -> float:
    began_s = time.monotonic()
    while not true():
        assert time.monotonic() - began_s < within_s
        time.sleep(0.01)
    return time.monotonic() - began_s


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextlib.contextmanager
def ray_head(
    temporary: Path, *, cpus: int, token: str | None = None, dashboard: bool = False, paths: Sequence[str] = ()
) -> Iterator[Head]:
    """Start one on loopback. token: without it nobody may use it; None: everybody may. paths: where its processes look
    for modules first."""
    port = free_port()
    web = free_port() if dashboard else 0
    environment = {
        **os.environ,
        "RAY_TMPDIR": str(temporary),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on loopback
        "PYTHONPATH": os.pathsep.join([*paths, *sys.path]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    if token is not None:
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    options = [f"--port={port}", f"--num-cpus={cpus}", "--object-store-memory=80000000", f"--temp-dir={temporary}"]
    if dashboard:  # its other ports are fixed otherwise, and may be another test's
        agents = [f"--{name}={free_port()}" for name in ("dashboard-agent-listen-port", "ray-client-server-port")]
        first = 40_000 + (os.getpid() % 200) * 100
        options += [f"--dashboard-port={web}", *agents, f"--min-worker-port={first}", f"--max-worker-port={first + 99}"]
    else:
        options += ["--include-dashboard=false"]
    before = processes()
    log = temporary / "head.log"
    with open(log, "wb") as file:
        started = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *options],
            env=environment,
            stdout=file,
            stderr=file,
        )
    try:
        until(lambda: "Ray runtime started" in log.read_text() or started.poll() is not None, START_S)
        assert started.poll() is None, log.read_text()
        yield Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{web}" if dashboard else "", environment)
    finally:
        below = processes().keys() - before.keys()
        started.terminate()
        started.wait(20.0)
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
