"""A Ray cluster of two hosts whose link is taken down while `fit` trains over both: two raylets, two networks."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.ray_head import START_S, until
from tests.replicas import late_host
from tests.two_hosts import Host, Switch, hosts

DRIVER = Path(__file__).parent / "driver_on_cluster.py"
PORT = 6379
NEAR_CPUS, FAR_CPUS = 3, 2  # the driver and the head are near
LATE_S = 4.0  # who is far joins after those who are near, so that servers are near
NOTICED_S = 2.0
NEXT_STEP_S = 4.0
GHOSTS_END_S = 9.0  # a cut connection is given up after 5 s
FULL_AGAIN_S = 90.0


def environment(host: Host) -> Mapping[str, str]:
    return {
        **os.environ,
        "TMPDIR": str(host.temporary),
        "RAY_TMPDIR": str(host.temporary),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "a" * 64,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(DRIVER.parent), *sys.path]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }


@contextlib.contextmanager
def raylet(host: Host, cpus: int, where: list[str], late_s: float = 0.0) -> Iterator[None]:
    """What `ray start` runs on a host."""
    log = host.files / "ray-start.log"
    options = [f"--node-ip-address={host.address}", f"--num-cpus={cpus}", "--object-store-memory=80000000"]
    with open(log, "wb") as file:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *where, *options]
        started = host.start(command, {**environment(host), late_host.LATE_S: str(late_s)}, file)
        until(lambda: "Ray runtime started" in log.read_text() or started.poll() is not None, START_S)
        assert started.poll() is None, log.read_text()
        try:
            yield
        finally:
            started.kill()
            started.wait()


class Driver:
    """`fit` on a host: what it tells, and what it has told."""

    def __init__(self, host: Host, update: str) -> None:
        address = f"{host.address}:{PORT}"
        run = host.temporary / f"run-{update}"
        command = [sys.executable, str(DRIVER), address, update, str(run)]
        self._process = host.start(command, environment(host), subprocess.PIPE)
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.told: list[dict[str, Any]] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.decode())
        self._lines.put(None)

    def until(self, what: Callable[[dict[str, Any]], object], within_s: float) -> dict[str, Any]:
        """Wait until it tells something. Returns: that."""
        end_s = time.monotonic() + within_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, end_s - time.monotonic()))
            except queue.Empty:
                pytest.fail(f"nothing of the kind within {within_s:g} s: {self._story()}")
            assert line is not None, self._story()
            try:
                found = json.loads(line)
            except ValueError:
                found = {"text": line.rstrip()}
            self.told.append(found)
            if what(found):
                return found

    def _story(self) -> str:
        """All that is told but the steps, of which there is the last."""
        return "\n".join(map(str, [*(told for told in self.told if "step" not in told), *self.steps()[-1:]]))

    def steps(self) -> list[dict[str, Any]]:
        return [told for told in self.told if "step" in told]

    def end(self) -> dict[str, Any]:
        """End the run as finished."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        ended = self.until(lambda told: told.get("ended"), 30.0)
        assert self._process.wait(20.0) == 0
        return ended

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def running(host: Host, update: str) -> Iterator[Driver]:
    driver = Driver(host, update)
    try:
        yield driver
    finally:
        driver.kill()


def members_on(host: Host) -> list[int]:
    return [pid for pid, command in host.processes().items() if "millrace.replicas.member" in command]


def left_behind(host: Host) -> list[str]:
    return [str(path) for place in (host.temporary, Path("/dev/shm")) for path in host.seen(place).glob("millrace*")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Switch, Host, Host]]:
    """A switch, and two hosts of a Ray cluster: where its head is, and the other."""
    pytest.importorskip("ray")
    with hosts(tmp_path_factory.mktemp("net"), "near", "far") as (switch, (near, far)):
        head = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={near.temporary}"]
        with raylet(near, NEAR_CPUS, head), raylet(far, FAR_CPUS, [f"--address={near.address}:{PORT}"], LATE_S):
            yield switch, near, far


@pytest.mark.cluster
@pytest.mark.long
@pytest.mark.parametrize("update", ["sync", "async"])
def test_a_run_goes_on_when_the_link_to_a_raylet_is_cut(cluster: tuple[Switch, Host, Host], update: str) -> None:
    switch, near, far = cluster
    with running(near, update) as driver:
        driver.until(lambda told: told.get("complete"), START_S)
        for back_soon in (True, False):
            cost = cut_and_mend(driver, switch, far, back_soon)
            print(f"{update}, link {'back soon' if back_soon else 'cut for long'}: {cost}")
        ended = driver.end()
    assert ended["restarts"] == 0
    losses = [told["loss"] for told in driver.steps()]
    assert sum(losses[-20:]) < sum(losses[:20])
    for host in (near, far):
        until(lambda host=host: not members_on(host) and not left_behind(host), 10.0)


def cut_and_mend(driver: Driver, switch: Switch, far: Host, back_soon: bool) -> dict[str, float]:
    """Cut a complete run in two, and make it whole again. Returns: seconds."""
    there: dict[str, str] = {told["joined"]: told["host"] for told in driver.told if "joined" in told}
    gone = {told["lost"] for told in driver.told if "lost" in told}
    cut_off = {member for member, host in there.items() if host.partition(" ")[0] == far.name} - gone
    last = driver.until(lambda told: "step" in told, 5.0)
    assert cut_off & set(last["workers"])
    assert not cut_off & set(last["servers"])
    ghosts = members_on(far)
    assert len(ghosts) == FAR_CPUS == len(cut_off)
    cut_s = switch.cut(far)
    before = len(driver.told)
    lost = [driver.until(lambda told: told.get("lost") in cut_off, NOTICED_S + 3.0) for _ in cut_off]
    noticed_s = lost[-1]["at_s"] - cut_s
    next_s = driver.until(lambda told: "step" in told, NEXT_STEP_S)["at_s"] - cut_s
    if back_soon:
        assert members_on(far) == ghosts
        mended_s = switch.mend(far)
    until(lambda: not set(ghosts) & set(members_on(far)), GHOSTS_END_S)
    ended_s = time.monotonic() - cut_s
    if not back_soon:
        mended_s = switch.mend(far)
    whole = driver.until(lambda told: told.get("complete"), FULL_AGAIN_S)
    moments = [cut_s, *(told["at_s"] for told in driver.told[before:] if "step" in told)]
    pause_s = max(later - earlier for earlier, later in itertools.pairwise(moments))
    assert noticed_s < NOTICED_S
    found = {"noticed": noticed_s, "next step": next_s, "longest pause": pause_s, "ghosts ended": ended_s}
    found["complete again after the link"] = whole["at_s"] - mended_s
    return {what: round(seconds, 2) for what, seconds in found.items()}
