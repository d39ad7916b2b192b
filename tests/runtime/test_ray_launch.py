"""Processes as children of Ray actors, on a Ray of this machine that is started for these tests."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.ray_head import START_S, processes, ray_head, until

from millrace.errors import PlacementError, SettingError
from millrace.replicas.hub import Hub, Joined, Lost, Said
from millrace.runtime.choose_launcher import choose_launcher
from millrace.runtime.handshake import new_token
from millrace.runtime.launch import Launcher
from millrace.runtime.messages import Message

MEMBER = "millrace.replicas.member"
ECHO = Path(__file__).parent.parent / "replicas"


def listening(pids: set[int]) -> set[str]:
    """The local addresses at which these processes accept connections, in the kernel's writing."""
    sockets = set()
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(file).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                found.add(fields[1].partition(":")[0])
    return found


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Launcher, Path]]:
    """A local Ray with room for four processes; what it leaves is looked at after the last test."""
    pytest.importorskip("ray")
    directory = tmp_path_factory.mktemp("ray")
    before, threads = processes(), threading.active_count()
    handler, variables = signal.getsignal(signal.SIGTERM), dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ECHO))
        began_s = time.monotonic()
        launcher = choose_launcher("local", MEMBER, ["--imports", "echo_role"], 1, directory, cpus=0.5, local_cpus=2)
        print(f"local Ray started in {time.monotonic() - began_s:.1f} s: {len(processes())} processes")
        with contextlib.closing(launcher):
            assert signal.getsignal(signal.SIGTERM) == handler
            yield launcher, directory
        began_s = time.monotonic()
        launcher.close()
    took_s = until(lambda: processes().keys() <= before.keys(), 10.0)
    print(f"nothing left after {took_s:.1f} s more")
    assert threading.active_count() == threads
    assert not (directory / "ray").exists()
    changed = {k for k in os.environ.keys() | variables.keys() if os.environ.get(k) != variables.get(k)}
    assert {k for k in changed if not k.startswith("RAY_") and k != "PYTEST_CURRENT_TEST"} == set()


@pytest.mark.cluster
@pytest.mark.slow
def test_members_join_answer_are_killed_and_known_to_be(local: tuple[Launcher, Path]) -> None:
    launcher, directory = local
    ray_only = set(processes())
    refused: list[str] = []
    hub = Hub(launcher, new_token(), directory, refused.append)
    began_s = time.monotonic()
    assert hub.start(3) == ["m0", "m1", "m2"]
    print(f"asked for in {1000 * (time.monotonic() - began_s):.0f} ms")
    joined = [hub.next(START_S) for _ in range(3)]
    print(f"members joined after {time.monotonic() - began_s:.1f} s")
    pids = {e.member: e.pid for e in joined if isinstance(e, Joined)}
    assert launcher.pids == pids
    assert set(listening(set(processes()) | {os.getpid()})) <= {"0100007F", "0000000000000000FFFF00000100007F"}
    for member in pids:
        hub.send(member, Message("role", {"role": "echo"}))
        began_s = time.monotonic()
        event = hub.next(10.0)
        assert isinstance(event, Said), event
        print(f"a role begins after {1000 * (time.monotonic() - began_s):.1f} ms")

    began_s = time.monotonic()
    os.kill(pids["m0"], signal.SIGKILL)
    event = hub.next(5.0)
    assert event == Lost("m0", "its process was killed by SIGKILL")
    print(f"SIGKILL known after {1000 * (time.monotonic() - began_s):.0f} ms")
    began_s = time.monotonic()
    hub.kill("m1", "for a test")
    assert hub.next(5.0) == Lost("m1", "for a test")
    assert pids["m1"] not in processes()
    print(f"killed through its actor in {1000 * (time.monotonic() - began_s):.0f} ms")
    hub.send("m2", Message("fail", {"text": "on purpose"}))
    event = hub.next(10.0)
    assert isinstance(event, Said)
    assert event.message.kind == "error"
    assert hub.next(10.0) == Lost("m2", "its process exited with 1; its last words: ValueError: on purpose")

    # Nobody else may use this Ray.
    program = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"
    gcs = importlib.import_module("ray").get_runtime_context().gcs_address
    for other in ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}, {"RAY_AUTH_MODE": "disabled"}):
        variables = {**os.environ, "RAY_AUTH_TOKEN_PATH": "", **other}
        done = subprocess.run([sys.executable, "-c", program, gcs], capture_output=True, text=True, env=variables)
        assert "InvalidAuthToken" in done.stderr

    # What they had of Ray is free again, and one more than it has is refused at once.
    assert hub.start(4) == ["m3", "m4", "m5", "m6"]
    with pytest.raises(PlacementError, match=r"m7 asks for 0\.5 CPU, but the local Ray has 2 in all, and 4 processes"):
        hub.start(1)
    event = hub.next(START_S)
    assert isinstance(event, Joined)
    # An actor that dies takes its process along.
    actor = int(Path(f"/proc/{event.pid}/stat").read_text().rpartition(")")[2].split()[1])
    others = [hub.next(START_S) for _ in range(3)]
    assert all(isinstance(other, Joined) for other in others)
    os.kill(actor, signal.SIGKILL)
    lost = hub.next(5.0)
    assert isinstance(lost, Lost)
    assert lost.member == event.member
    assert lost.why.startswith("its process ended with its Ray actor (ActorDiedError)")
    until(lambda: event.pid not in processes(), 1.0)
    hub.close()
    assert refused == []
    until(lambda: not set(processes()) - ray_only, 10.0)


@pytest.fixture
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray that somebody has started on this machine, with two cores: its address."""
    pytest.importorskip("ray")
    with ray_head(tmp_path_factory.mktemp("head"), cpus=2, paths=[str(ECHO)]) as started:
        yield started.address


@pytest.mark.long
@pytest.mark.cluster
@pytest.mark.slow
def test_a_cluster_is_joined_and_what_it_has_no_room_for_is_lost_in_its_time(head: str, tmp_path: Path) -> None:
    before = set(processes())
    launcher = choose_launcher(head, MEMBER, ["--imports", "echo_role"], 1, tmp_path, schedule_within_s=3.0)
    with contextlib.closing(Hub(launcher, new_token(), tmp_path, print)) as hub:
        assert hub.address.startswith("tcp:127.0.0.1:")
        began_s = time.monotonic()
        hub.start(3)
        events = {e.member: e for e in (hub.next(START_S) for _ in range(3)) if e is not None}
        (lost,) = (e for e in events.values() if isinstance(e, Lost))
        assert "found no room within 3 s: it asks for 1 CPU; Ray at" in lost.why
        assert "has 2 CPU of which 0 free on 1 machines" in lost.why
        assert len(hub.members) == 2
        print(f"joined after {time.monotonic() - began_s:.1f} s")
        for member in hub.members:
            hub.send(member, Message("role", {"role": "echo"}))
            assert isinstance(hub.next(10.0), Said)
        pids = [e.pid for e in events.values() if isinstance(e, Joined)]
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 5.0)
    until(lambda: not any("replicas.member" in command for command in processes().values()), 5.0)
    assert before - set(processes()) == set()  # the cluster lives on

    # Who needs more than there is gets nothing, and those who fit have all of it.
    said: list[str] = []
    with pytest.raises(PlacementError) as refused:
        choose_launcher(head, MEMBER, [], 1, tmp_path, schedule_within_s=3.0, processes=3, say=said.append)
    assert "The 3 processes of this run found no room within 3 s: they ask for 1 CPU each, 3" in str(refused.value)
    assert f"Ray at {head} has 2 CPU of which 2 free on 1 machines" in str(refused.value)
    assert said[0].startswith("waiting up to 3 s for room: they ask for 1 CPU each")
    launcher = choose_launcher(head, MEMBER, [], 1, tmp_path, schedule_within_s=20.0, processes=2)
    with contextlib.closing(Hub(launcher, new_token(), tmp_path, print)) as hub:
        hub.start(2)
        assert all(isinstance(hub.next(START_S), Joined) for _ in range(2))
        hub.kill("m0", "for a test")
        assert isinstance(hub.next(5.0), Lost)
        hub.start(1)
        assert isinstance(hub.next(START_S), Joined), "a lost one's room is taken by the next"


def test_without_a_cluster_nothing_of_ray_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys, json, pathlib\n"
        "from millrace.runtime.choose_launcher import choose_launcher\n"
        "from millrace.replicas import hub\n"
        "choose_launcher(None, 'm', [], 1, pathlib.Path(sys.argv[1])).close()\n"
        "print(json.dumps([name for name in sys.modules if name.split('.')[0] == 'ray' or 'ray_launch' in name]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, env=environment, check=True)
    assert json.loads(done.stdout) == []


def test_a_missing_ray_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "millrace.runtime.ray_launch", raising=False)
    with pytest.raises(SettingError, match=r"pip install 'millrace\[ray\]'"):
        choose_launcher("local", "m", [], 1, tmp_path)


@pytest.mark.cluster
def test_addresses_where_no_cluster_is_are_refused_at_once(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    importlib.import_module("millrace.runtime.ray_launch")
    began_s = time.monotonic()
    with pytest.raises(SettingError, match="expected 'local', 'HOST:PORT' or 'ray://HOST:PORT'"):
        choose_launcher("somewhere", "m", [], 1, tmp_path)
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with pytest.raises(SettingError, match=f"no Ray cluster answers at {address}"):
            choose_launcher(address, "m", [], 1, tmp_path)
    assert time.monotonic() - began_s < 10.0
