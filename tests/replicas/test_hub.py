"""Members as real processes: killed, frozen, stuck, failing: each known to be lost in its time, and nothing is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from millrace.errors import WorkerError
from millrace.replicas.hub import Event, Hub, Joined, Lost, Said
from millrace.replicas.member import environment
from millrace.runtime.handshake import dial, listen, new_token
from millrace.runtime.launch import ProcessLauncher
from millrace.runtime.messages import Message, receive, send
from millrace.version import __version__

START_S = 60.0  # on a busy machine
TOKEN = new_token()
MEMBER = "millrace.replicas.member"
HERE = Path(__file__).parent


@pytest.fixture(autouse=True, scope="module")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let the process that members are forked from be there before open files are counted."""
    with contextlib.closing(ProcessLauncher(MEMBER, [], 1, tmp_path_factory.mktemp("first"))) as launcher:
        launcher.start("first", environment("unix:/nowhere", TOKEN, HERE))


class Run:
    """A hub and what it was heard to say. refused: of strangers."""

    def __init__(self, directory: Path, count: int) -> None:
        self.refused: list[str] = []
        launcher = ProcessLauncher(MEMBER, ["--imports", "echo_role"], 1, directory)
        self.hub = Hub(launcher, TOKEN, directory, self.refused.append, start_within_s=START_S)
        self.pids: dict[str, int] = {}
        self.spares = self.hub.start(count)
        began_s = time.monotonic()
        while len(self.pids) < count:
            event = self.next(START_S)
            assert isinstance(event, Joined)
            self.pids[event.member] = event.pid
        print(f"{count} members started in {time.monotonic() - began_s:.1f} s")

    def next(self, timeout_s: float = 5.0) -> Event:
        event = self.hub.next(timeout_s)
        assert event is not None
        return event

    def said(self, member: str, kind: str) -> Message:
        event = self.next()
        assert isinstance(event, Said), event
        assert (event.member, event.message.kind) == (member, kind)
        return event.message

    def lost(self, member: str) -> str:
        event = self.next()
        assert isinstance(event, Lost), event
        assert event.member == member
        assert member not in self.hub.members
        return event.why

    def echo(self) -> str:
        """A spare that has taken the role."""
        member = self.spares.pop(0)
        self.hub.send(member, Message("role", {"role": "echo"}))
        self.said(member, "begun")
        return member


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """One run for all tests below: each takes members of its own, and what it does to them must not harm the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        run = Run(tmp_path_factory.mktemp("run"), 7)
        with contextlib.closing(run.hub):
            yield run
        assert run.hub.next(0.0) is None


def until(true: Callable[[], object], within_s: float) -> float:
    began_s = time.monotonic()
    while not true():
        assert time.monotonic() - began_s < within_s
        time.sleep(0.005)
    return time.monotonic() - began_s


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_messages_and_tensors_come_back_and_a_role_ends_in_a_spare(members: Run) -> None:
    member = members.echo()
    x = torch.randn(2000, 1000)
    members.hub.send(member, Message("echo", {"text": "grüß"}, {"x": x}))
    answer = members.said(member, "said")
    assert answer.fields["text"] == "grüß"
    assert torch.equal(answer.tensors["x"], x)
    members.hub.send(member, Message("leave"))
    members.hub.send(member, Message("for the role that has ended"))
    began_s = time.monotonic()
    members.hub.send(member, Message("role", {"role": "echo", "again": True}))
    assert members.said(member, "begun").fields == {"role": "echo", "again": True}
    print(f"a role begins after {1000 * (time.monotonic() - began_s):.1f} ms")
    members.hub.send(member, Message("leave"))
    members.spares.append(member)


def test_abandon_is_known_before_its_turn_among_the_messages(members: Run) -> None:
    member = members.echo()
    for generation, done_s in ((7, 0.0), (6, 0.0), (8, 0.5)):  # work of generations up to 7 ends at its first look
        began_s = time.monotonic()
        members.hub.send(member, Message("work", {"turns": 10, "generation": generation}))
        members.hub.send(member, Message("abandon", {"generation": min(generation, 7)}))
        members.said(member, "said")
        assert (time.monotonic() - began_s > 0.45) == (done_s > 0.45)
        assert members.said(member, "said").fields["kind"] == "abandon"
    members.hub.send(member, Message("leave"))
    members.spares.append(member)


def test_a_killed_member_is_known_at_once(members: Run) -> None:
    member = members.spares.pop()
    began_s = time.monotonic()
    os.kill(members.pids[member], signal.SIGKILL)
    assert "its process was killed by SIGKILL" in members.lost(member)
    took_s = time.monotonic() - began_s
    print(f"SIGKILL known after {1000 * took_s:.0f} ms")
    assert took_s < 1.0
    members.hub.send(member, Message("echo"))  # goes nowhere
    members.hub.kill(member, "twice")
    assert members.hub.next(0.3) is None
    assert gone(members.pids[member])


def test_what_a_member_had_said_when_it_was_killed_is_heard(members: Run) -> None:
    member = members.echo()
    members.hub._tell(lambda: time.sleep(0.5))  # it answers while nobody listens
    for turn in range(3):
        members.hub.send(member, Message("echo", {"turn": turn}, {"content": torch.zeros(10_000)}))
    members.hub.kill(member, "it was enough")
    heard = [members.next() for _ in range(4)]
    assert [event.message.fields["turn"] for event in heard if isinstance(event, Said)] == [0, 1, 2]
    assert heard[-1] == Lost(member, "it was enough")
    assert members.hub.next(0.3) is None


def test_a_frozen_member_is_killed_and_known(members: Run) -> None:
    member = members.echo()
    members.hub.send(member, Message("hang"))
    began_s = time.monotonic()
    os.kill(members.pids[member], signal.SIGSTOP)
    assert "stopped (no sign of life for 1.0 s)" in members.lost(member)
    took_s = time.monotonic() - began_s
    print(f"SIGSTOP known after {1000 * took_s:.0f} ms")
    assert took_s < 2.0
    assert gone(members.pids[member])


def test_a_stuck_member_is_killed_and_says_in_what_but_not_one_who_works(members: Run) -> None:
    member = members.echo()
    members.hub.expect(member, 0.5)
    members.hub.send(member, Message("work", {"turns": 20}))  # 1 s, counted on every 0.05 s
    members.said(member, "said")
    members.hub.expect(member, None)
    assert members.hub.next(0.7) is None  # nothing is expected of it
    members.hub.expect(member, 0.5)
    members.hub.send(member, Message("hang"))
    began_s = time.monotonic()
    assert members.lost(member) == "stuck: no progress for 0.5 s while doing a nap (patience_s allows more)"
    took_s = time.monotonic() - began_s
    print(f"stuck known after {1000 * took_s:.0f} ms of 500")
    assert 0.4 < took_s < 1.5
    assert gone(members.pids[member])


def test_what_a_role_raises_is_said_before_the_member_is_lost(members: Run) -> None:
    member = members.echo()
    members.hub.send(member, Message("fail", {"text": "the 7th is odd"}))
    assert members.said(member, "error").fields == {"type": "", "text": "ValueError: the 7th is odd"}
    assert members.lost(member) == "its process exited with 1; its last words: ValueError: the 7th is odd"


def test_an_unknown_role_is_an_error_with_the_known_ones(members: Run) -> None:
    member = members.spares.pop(0)
    members.hub.send(member, Message("role", {"role": "ecko"}))
    error = members.said(member, "error")
    assert error.fields["type"] == "SettingError"
    assert "'echo'" in error.fields["text"]
    members.lost(member)


def test_strangers_at_the_port_are_refused_and_the_run_is_unharmed(members: Run) -> None:
    member = members.echo()
    path = members.hub.address.removeprefix("unix:")
    with contextlib.ExitStack() as stay:
        for content in (b"GET / HTTP/1.1\r\n\r\n", b"", b"\0" * 5000):
            stranger = stay.enter_context(socket.socket(socket.AF_UNIX))
            stranger.connect(path)
            stranger.sendall(content)
        with pytest.raises(WorkerError, match="another token"):
            dial(members.hub.address, new_token(), {"name": member, "for": "line"}, 5.0)
        for name in ("m99", member, None):  # they know the token, but are not wanted
            stay.enter_context(dial(members.hub.address, TOKEN, {"name": name, "for": "line"}, 5.0))
        members.hub.send(member, Message("echo"))
        members.said(member, "said")
        until(lambda: len(members.refused) >= 6, 2.0)
    for text in ("does not speak millrace", "another token", "no such member", "once too often"):
        assert any(text in refused for refused in members.refused), members.refused
    assert member in members.hub.members


def test_a_member_that_cannot_start_is_lost_with_the_reason(tmp_path: Path) -> None:
    files, threads = open_files(), threading.active_count()
    launcher = ProcessLauncher(MEMBER, ["--imports", "no_such_module"], 1, tmp_path)
    with contextlib.closing(Hub(launcher, TOKEN, tmp_path, print)) as hub:
        hub.start(1)
        with pytest.raises(WorkerError, match="m0 has not joined yet"):
            hub.send("m0", Message("echo"))
        event = hub.next(START_S)
        assert isinstance(event, Lost)
        assert event.why.startswith("before it was ready, its process exited with 1; its last words:")
        assert "no_such_module" in event.why
    assert open_files() <= files  # fewer, if something of an earlier test was collected meanwhile
    assert threading.active_count() <= threads


def test_a_member_of_another_version_is_lost_with_both_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    refused: list[str] = []
    launcher = ProcessLauncher(MEMBER, ["--imports", "other_version"], 1, tmp_path)
    with contextlib.closing(Hub(launcher, TOKEN, tmp_path, refused.append)) as hub:
        hub.start(1)
        event = hub.next(START_S)
    assert isinstance(event, Lost)
    for text in (event.why, *refused):
        assert __version__ in text
        assert "99.0" in text
        assert "install the same version on all machines of a run" in text
    assert len(refused) == 1


def test_a_member_that_does_not_start_in_time_is_lost_and_closing_leaves_nothing(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = tmp_path_factory.mktemp("modules")
    (modules / "slow_to_import.py").write_text("import time; time.sleep(600)")
    monkeypatch.syspath_prepend(str(modules))
    files, threads = open_files(), threading.active_count()
    launcher = ProcessLauncher(MEMBER, ["--imports", "slow_to_import"], 1, tmp_path)
    hub = Hub(launcher, TOKEN, tmp_path, print, start_within_s=0.1)
    assert hub.start(1) == ["m0"]
    event = hub.next(5.0)
    assert isinstance(event, Lost)
    assert event.why == "it did not start within 0.1 s"
    assert hub.start(2) == ["m1", "m2"]
    hub.close()
    hub.close()
    assert all(not Path(f"/proc/{pid}").exists() for pid in launcher.pids.values())
    assert sorted(os.listdir(tmp_path)) == ["m0.log", "m1.log", "m2.log"]
    assert open_files() <= files  # fewer, if something of an earlier test was collected meanwhile
    assert threading.active_count() <= threads
    with pytest.raises(WorkerError, match="the hub was closed"):
        hub.start(1)


def test_a_member_ends_with_its_line_also_while_its_role_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing else would end it, as when the driver is on another machine."""
    monkeypatch.syspath_prepend(str(HERE))
    launcher = ProcessLauncher(MEMBER, ["--imports", "echo_role"], 1, tmp_path)
    with contextlib.closing(listen("tcp:127.0.0.1:0")) as listener, contextlib.closing(launcher):
        launcher.start("m0", environment(listener.address, TOKEN, tmp_path))
        lines = {hello["for"]: c for c, hello in (listener.accept(TOKEN, START_S) for _ in range(2))}
        send(lines["line"], Message("role", {"role": "echo"}), 5.0, "m0")
        send(lines["line"], Message("hang"), 5.0, "m0")
        assert receive(lines["line"], 5.0, "m0").kind == "begun"
        for _ in range(20):
            assert receive(lines["beat"], 1.0, "m0").kind == "beat"
        assert launcher.exit_of("m0") is None
        for connection in lines.values():
            connection.close()
        print(f"gone {1000 * until(lambda: launcher.exit_of('m0'), 1.0):.0f} ms after its line")


@contextlib.contextmanager
def driver(directory: Path) -> Iterator[tuple[subprocess.Popen[str], list[int], list[str]]]:
    """A driver of two members at work, their processes, and the lines that it has said since."""
    with open(directory / "driver.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "driver_to_stop.py"), str(directory)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
        )
    assert process.stdout is not None
    pids: list[int] = []
    try:
        begun = 0
        while begun < 2:
            said = json.loads(process.stdout.readline())
            pids += [said["pid"]] if "pid" in said else []
            begun += "begun" in said.get("event", "")
        lines: list[str] = []
        stdout = process.stdout
        reader = threading.Thread(target=lambda: lines.extend(stdout), daemon=True)
        reader.start()
        yield process, pids, lines
    finally:
        process.kill()
        process.wait()
        for pid in pids:
            until(lambda pid=pid: gone(pid), 5.0)  # type: ignore[misc]
        reader.join(5.0)
        process.stdout.close()


def test_a_driver_that_slept_blames_nobody_and_when_it_is_killed_its_members_end(tmp_path: Path) -> None:
    with driver(tmp_path) as (process, pids, lines):
        everybody = [process.pid, *pids]
        for pid in everybody:
            os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(2.0)
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(0.5)  # the members take a moment longer to come back
        finally:
            for pid in everybody:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        time.sleep(1.5)
        assert not any(gone(pid) for pid in everybody)
        process.kill()
        took_s = until(lambda: all(gone(pid) for pid in pids), 1.0)
        print(f"members gone {1000 * took_s:.0f} ms after their driver")
    assert lines == []


def test_who_cannot_be_started_is_lost_and_the_others_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine may be short of something for a moment."""
    start = ProcessLauncher.start

    def fails_once(launcher: ProcessLauncher, name: str, environment: dict[str, str]) -> None:
        if name == "m0":
            raise BlockingIOError("Resource temporarily unavailable")
        start(launcher, name, environment)

    monkeypatch.setattr(ProcessLauncher, "start", fails_once)
    launcher = ProcessLauncher(MEMBER, [], 1, tmp_path)
    with contextlib.closing(Hub(launcher, TOKEN, tmp_path, print, start_within_s=START_S)) as hub:
        assert hub.start(2) == ["m0", "m1"]
        events = [hub.next(START_S), hub.next(START_S)]
        assert Lost("m0", "it could not be started: Resource temporarily unavailable") in events
        assert any(isinstance(event, Joined) for event in events)
        assert hub.members == ("m1",)
