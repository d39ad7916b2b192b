"""Groups of real processes: what they add up, and what the survivors see when one of them is killed or stopped."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.replicas.collective_rank import LARGE

from millrace.errors import SettingError, WorkerError
from millrace.replicas.gloo_group import GlooGroup
from millrace.replicas.rendezvous import GRACE_S, Rendezvous, StoreAddress
from millrace.replicas.shared_group import SharedGroup

PROGRAM = Path(__file__).with_name("collective_rank.py")
KINDS = ["gloo", "shared"]
# Of the sum of magnitudes. bfloat16 is rounded twice, by at most 2^-8 each.
LIMITS = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 2.01 * 2**-8}
HEARD_S = 1.0  # from the word that a group is abandoned to the error


class Process:
    """A rank of `collective_rank.py`, and calls to it."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid, self._connection = pid, connection
        self._lines = connection.makefile("r")

    def tell(self, **message: Any) -> None:
        self._connection.sendall((json.dumps(message) + "\n").encode())

    def hear(self, limit_s: float = 60.0) -> dict[str, Any]:
        assert select.select([self._connection], [], [], limit_s)[0], "no answer"
        heard: dict[str, Any] = json.loads(self._lines.readline())
        return heard

    def has_ended(self) -> bool:
        """Whether it is a zombie: nobody waits for it before the tests are over."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    def hang_up(self) -> None:
        self._connection.shutdown(socket.SHUT_RDWR)


class Team:
    """Processes that take the ranks, and the store where they meet."""

    def __init__(self, place: Path) -> None:
        self.rendezvous = Rendezvous()
        self.generation = 0
        self._listening = socket.socket(socket.AF_UNIX)
        self._path = str(place / "socket")
        self._listening.bind(self._path)
        self._listening.listen()
        self._program = subprocess.Popen(
            [sys.executable, str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._hear() == "ready"
        self.processes = [self.new_process() for _ in range(4)]
        self.others: list[Process] = []  # that have ended before

    def new_process(self) -> Process:
        assert self._program.stdin is not None
        self._program.stdin.write(self._path + "\n")
        self._program.stdin.flush()
        pid = self._hear()
        return Process(pid, self._listening.accept()[0])

    def end(self) -> list[int]:
        """How the ranks ended when nobody called them any more, by themselves; they are killed if they do not."""
        assert self._program.stdin is not None
        for process in self.processes:
            process.hang_up()
        self._program.stdin.close()
        try:
            ends = self._hear(limit_s=90.0)
        except AssertionError:
            for process in self.processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            raise
        finally:
            self._program.wait()
            self.rendezvous.close()
        return [ends[str(process.pid)] for process in (*self.processes, *self.others)]

    def _hear(self, limit_s: float = 120.0) -> Any:
        assert self._program.stdout is not None
        assert select.select([self._program.stdout], [], [], limit_s)[0], "no answer"
        return json.loads(self._program.stdout.readline())

    def retire(self, process: Process) -> None:
        """It is in no group any more, and ends with the others."""
        self.others.append(process)
        process.hang_up()

    def join(self, kind: str, size: int, timeout_s: float = 30.0, **more: Any) -> list[float]:
        self.tell_to_join(kind, size, timeout_s=timeout_s, **more)
        return [process.hear()["answer"] for process in self.processes[:size]]

    def tell_to_join(
        self, kind: str, size: int, *, among: Sequence[Process] = (), again: bool = False, **more: Any
    ) -> None:
        """Tell the ranks, or some of them, to form the next generation; again: the last one."""
        self.generation += not again
        if kind == "shared":
            more.setdefault("chunk_bytes", 1 << 17)  # so that there are more rounds than slots
        where = self.rendezvous.address
        for rank, process in enumerate(self.processes[:size]):
            if process in among or not among:
                more.update(generation=self.generation, rank=rank, size=size)
                process.tell(call="join", kind=kind, address=[where.host, where.port, where.secret], **more)

    def all(self, size: int, call: str, **arguments: Any) -> list[Any]:
        for process in self.processes[:size]:
            process.tell(call=call, **arguments)
        heard = [process.hear() for process in self.processes[:size]]
        assert all("answer" in answer for answer in heard), heard
        return [answer["answer"] for answer in heard]

    def sums_are_right(self, size: int, seed: int, **arguments: Any) -> str:
        """Reduce and compare with the plain sum; returns the bits that all ranks have."""
        found = self.all(size, "reduce", seed=seed, **arguments)
        limit = LIMITS[arguments.get("dtype", "float64")]
        assert found[0]["error"] <= limit
        assert len({answer["digest"] for answer in found}) == 1
        bits: str = found[0]["digest"]
        return bits


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    found = Team(tmp_path_factory.mktemp("team"))
    yield found
    assert set(found.end()) == {0}, "a rank ended with an error"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_sums_are_the_same_bits_on_all_ranks_and_in_every_run(kind: str, size: int, team: Team) -> None:
    cases: list[dict[str, Any]] = [{"dtype": dtype, "even": size == 4} for dtype in LIMITS]
    cases.append({"large": True, "even": False})
    runs: list[list[str]] = []
    for _ in range(2):
        team.join(kind, size)
        runs.append([team.sums_are_right(size, seed, **case) for seed, case in enumerate(cases)])
        team.all(size, "close")
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == len(cases)


@pytest.mark.parametrize("size", [2, 3])
def test_bfloat16_on_the_wire_keeps_its_bound(size: int, team: Team) -> None:
    team.join("gloo", size, wire="bfloat16")
    for dtype in ("float32", "float64", "bfloat16"):
        found = team.all(size, "reduce", seed=3, even=False, dtype=dtype)
        assert len({answer["digest"] for answer in found}) == 1
        assert LIMITS["float32"] < found[0]["error"] <= LIMITS["bfloat16"]
    team.all(size, "close")


@pytest.mark.parametrize("size", [2, 3])
def test_bfloat16_halves_what_float32_gradients_send(size: int, team: Team) -> None:
    sent = []
    for wire in (None, "bfloat16"):
        team.join("gloo", size, wire=wire)
        before = sum(team.all(size, "sent_bytes"))
        team.all(size, "reduce", seed=3, dtype="float32", large=True)
        sent.append(sum(team.all(size, "sent_bytes")) - before)
        team.all(size, "close")
    least = 2 * (size - 1) * 4 * sum(math.prod(shape) for shape in LARGE)  # of a ring
    assert least <= sent[0] < 1.05 * least
    assert sent[1] == pytest.approx(sent[0] / 2, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_one_host_and_of_several_agree(kind: str, team: Team) -> None:
    """Two ranks add up two numbers: there is one right rounding."""
    bits = []
    for used in ("gloo", kind):
        team.join(used, 2)
        bits.append(team.sums_are_right(2, 11, even=False))
        team.all(2, "close")
    assert bits[0] == bits[1]


@pytest.mark.parametrize("kind", KINDS)
def test_buckets_under_way_together(kind: str, team: Team) -> None:
    team.join(kind, 2)
    for number in range(3):
        team.all(2, "begin", bucket_index=number, seed=number)
    together = team.all(2, "wait")
    alone = []
    for number in range(3):
        team.all(2, "begin", bucket_index=0, seed=number)
        alone.append(team.all(2, "wait")[0])
    assert together[0] == together[1]
    assert len(set(alone)) == 3
    for number in range(3):
        team.all(2, "begin", bucket_index=2 * number, seed=number)
    assert team.all(2, "wait")[0] == together[0]
    team.all(2, "close")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 3])
def test_broadcast(kind: str, size: int, team: Team) -> None:
    team.join(kind, size)
    for source in (*range(size), 0):
        assert team.all(size, "broadcast", seed=source, source=source) == [True] * size
    team.sums_are_right(size, 5)
    team.all(size, "close")


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_reduced_is_refused_and_does_no_harm(kind: str, team: Team) -> None:
    team.join(kind, 2)
    said = team.all(2, "refused")[0]
    for error, part in zip(said, ["tensor 1 is torch.int64", "meta", "nan", "mixes", "ranks 0 to 1"], strict=True):
        assert error.startswith("SettingError")
        assert part in error
    team.sums_are_right(2, 6)
    team.all(2, "close")


def survivors_fail_when_told(team: Team, survivors: Sequence[Process]) -> None:
    for process in survivors:
        process.tell(abandon=True)
    told_s = time.monotonic()
    for process in survivors:
        heard = process.hear(limit_s=HEARD_S)
        assert heard["error"] == "WorkerError"
        assert f"of 4 in generation {team.generation}" in heard["message"]
        process.tell(call="reduce", seed=0)
        heard = process.hear(limit_s=HEARD_S)
        assert "can be used no more" in heard["message"]
    assert time.monotonic() - told_s < HEARD_S


def four_again(team: Team, kind: str) -> None:
    """The next generation forms quickly and adds up correctly."""
    assert max(team.join(kind, 4)) < 2.0
    team.sums_are_right(4, 8, even=False)
    team.all(4, "close")


@pytest.mark.parametrize(
    ("kind", "sign", "in_mid"),
    [
        ("gloo", signal.SIGKILL, True),
        ("gloo", signal.SIGKILL, False),
        ("gloo", signal.SIGSTOP, True),
        ("shared", signal.SIGKILL, True),
        ("shared", signal.SIGSTOP, True),
    ],
)
def test_survivors_of_a_lost_rank_form_the_next_generation(
    kind: str, sign: signal.Signals, in_mid: bool, team: Team
) -> None:
    """In mid: all reduce without a pause. Otherwise: the others wait, and the victim has not begun."""
    team.join(kind, 4, timeout_s=20.0)
    victim, survivors = team.processes[2], [team.processes[at] for at in (0, 1, 3)]
    for process in team.processes if in_mid else survivors:
        process.tell(call="reduce_on")
    time.sleep(0.15)
    os.kill(victim.pid, sign)
    time.sleep(0.05)
    survivors_fail_when_told(team, survivors)
    team.processes[2] = team.new_process()
    try:
        assert max(team.join(kind, 4)) < 2.0  # while a stopped victim lives on
        team.sums_are_right(4, 8, even=False)
        team.all(4, "close")
    finally:
        os.kill(victim.pid, signal.SIGKILL)  # the program that forked it has not taken note of its end: it is there


@pytest.mark.long
@pytest.mark.parametrize("place", [0, 2])
def test_a_stopped_rank_that_goes_on_changes_no_bit_of_later_generations(place: int, team: Team) -> None:
    """Stopped anywhere in a round of shared memory, also as the one whose memory it is; it goes on while others add."""
    choices = random.Random(place)
    team.join("shared", 4)
    bits = [team.sums_are_right(4, seed, large=True, even=False) for seed in range(4)]
    team.all(4, "close")
    other = team.new_process()
    for _ in range(5):
        team.join("shared", 4, timeout_s=20.0, chunk_bytes=1 << choices.randint(12, 17))
        for process in team.processes:
            process.tell(call="reduce_on")
        time.sleep(choices.uniform(0.0, 0.05))
        stopped = team.processes[place]
        os.kill(stopped.pid, signal.SIGSTOP)
        try:
            survivors_fail_when_told(team, [process for process in team.processes if process is not stopped])
            team.processes[place], other = other, stopped
            assert max(team.join("shared", 4)) < 2.0
            for process in team.processes:
                process.tell(call="reduce", seed=0, large=True, even=False)
        finally:
            os.kill(stopped.pid, signal.SIGCONT)
        assert {process.hear()["answer"]["digest"] for process in team.processes} == {bits[0]}
        assert [team.sums_are_right(4, seed, large=True, even=False) for seed in (1, 2, 3)] == bits[1:]
        stopped.tell(abandon=True)
        assert "abandoned while it waited" in stopped.hear(limit_s=HEARD_S)["message"]
        team.all(4, "close")
    team.retire(other)


def test_a_rank_that_comes_late_does_not_open_the_memory_of_the_next_generation(team: Team) -> None:
    """Rank 0 has that under the number of the one before, and the place that it told was of that."""
    late, others = team.processes[3], team.processes[:3]
    os.kill(late.pid, signal.SIGSTOP)
    try:
        team.tell_to_join("shared", 4, timeout_s=20.0)
        time.sleep(0.3)
        for process in others:
            process.tell(abandon=True)
        assert all("was abandoned" in process.hear(limit_s=HEARD_S)["message"] for process in others)
        team.processes[3] = team.new_process()
        team.tell_to_join("shared", 4, among=others, timeout_s=20.0)
        time.sleep(0.3)  # rank 0 has its memory open, as one is missing
    finally:
        os.kill(late.pid, signal.SIGCONT)
    assert re.search("found other memory|cannot open the memory", late.hear(limit_s=5.0)["message"])
    team.tell_to_join("shared", 4, among=team.processes[3:], timeout_s=20.0, again=True)
    assert all("answer" in process.hear() for process in team.processes)
    team.sums_are_right(4, 3, even=False)
    team.all(4, "close")
    team.retire(late)


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_ends_while_an_operation_of_its_does_not(kind: str, team: Team) -> None:
    first, stopped = team.new_process(), team.new_process()
    team.processes, others = [first, stopped, *team.processes[2:]], team.processes[:2]
    try:
        team.join(kind, 2, timeout_s=600.0)
        first.tell(call="reduce_on")
        os.kill(stopped.pid, signal.SIGSTOP)
        time.sleep(0.1)
        first.tell(abandon=True)
        assert "abandoned" in first.hear()["message"]
        first.hang_up()
        until_s = time.monotonic() + 20.0
        while not first.has_ended():
            assert time.monotonic() < until_s
            time.sleep(0.02)
    finally:
        os.kill(stopped.pid, signal.SIGKILL)
        os.kill(first.pid, signal.SIGKILL)  # a zombie keeps the code that it ended with
        team.processes[:2] = others
        team.others.append(first)


@pytest.mark.parametrize("kind", KINDS)
def test_waits_end_without_being_told(kind: str, team: Team) -> None:
    team.join(kind, 2, timeout_s=0.5)
    team.processes[0].tell(call="reduce", seed=0)
    heard = team.processes[0].hear(limit_s=2.0)
    assert heard["error"] == "WorkerError"
    assert f"Rank 0 of 2 in generation {team.generation}" in heard["message"]
    assert 0.4 < heard["seconds"] < 1.5
    team.processes[1].tell(call="close")
    team.processes[1].hear()


@pytest.mark.parametrize("kind", KINDS)
def test_generations_leave_nothing_behind(kind: str, team: Team) -> None:
    found = []
    for generation in range(4):
        team.join(kind, 3)
        team.sums_are_right(3, generation)
        team.all(3, "close")
        found.append(team.all(3, "open"))
    assert found[-1] == found[0]
    assert [counts["maps"] for counts in found[0]] == [0, 0, 0]


def test_what_abandoned_operations_hold_is_freed_when_they_have_ended(team: Team) -> None:
    before = team.all(2, "open")[0]
    team.join("gloo", 2, timeout_s=0.5)
    team.processes[0].tell(call="reduce_on")
    time.sleep(0.1)
    team.processes[0].tell(abandon=True)
    assert "abandoned" in team.processes[0].hear()["message"]
    during = team.all(1, "open")[0]
    team.processes[1].tell(call="close")
    team.processes[1].hear()
    time.sleep(0.5 + GRACE_S + 0.5)
    team.join("gloo", 1)  # whoever makes a group looks for what has ended
    after = team.all(1, "open")[0]
    assert during["threads"] > before["threads"]
    assert after["threads"] <= before["threads"]
    assert after["files"] <= before["files"]


class TestAlone:
    """What a process sees that nobody joins."""

    @pytest.fixture
    def address(self) -> Iterator[StoreAddress]:
        rendezvous = Rendezvous()
        yield rendezvous.address
        rendezvous.close()

    @pytest.mark.parametrize("kind", [GlooGroup, SharedGroup])
    @pytest.mark.parametrize("rank", [0, 1])
    def test_nobody_else_comes(self, kind: Any, rank: int, address: StoreAddress) -> None:
        begun_s = time.monotonic()
        with pytest.raises(WorkerError, match=f"Rank {rank} of 2 in generation 7 waited 0.2 s for"):
            kind(address, 7, rank, 2, abandoned=lambda: False, timeout_s=0.2)
        assert time.monotonic() - begun_s < 1.0

    @pytest.mark.parametrize("kind", [GlooGroup, SharedGroup])
    def test_the_group_is_abandoned_before_it_has_formed(self, kind: Any, address: StoreAddress) -> None:
        begun_s = time.monotonic()
        with pytest.raises(WorkerError, match="abandoned"):
            kind(address, 7, 0, 2, abandoned=lambda: time.monotonic() - begun_s > 0.1, timeout_s=3.0)
        assert time.monotonic() - begun_s < 1.0

    @pytest.mark.parametrize("kind", [GlooGroup, SharedGroup])
    def test_there_is_no_driver(self, kind: Any) -> None:
        rendezvous = Rendezvous()
        rendezvous.close()
        begun_s = time.monotonic()
        with pytest.raises(WorkerError, match="generation 1"):
            kind(rendezvous.address, 1, 0, 2, abandoned=lambda: False, timeout_s=0.5)
        assert time.monotonic() - begun_s < 1.5

    def test_wrong_settings(self, address: StoreAddress) -> None:
        with pytest.raises(SettingError, match="ranks 0 to 1, not 2"):
            GlooGroup(address, 1, 2, 2, abandoned=lambda: False, timeout_s=1.0)
        with pytest.raises(SettingError, match="bfloat16"):
            GlooGroup(address, 1, 0, 1, abandoned=lambda: False, timeout_s=1.0, wire="int8")
        with pytest.raises(WorkerError, match=r"192\.0\.2\.1"):
            Rendezvous("192.0.2.1")

    @pytest.mark.parametrize("kind", [GlooGroup, SharedGroup])
    def test_buckets_begin_in_rising_order(self, kind: Any, address: StoreAddress) -> None:
        group = kind(address, 1, 0, 1, abandoned=lambda: False, timeout_s=1.0)
        handle = group.all_reduce_begin(3, [torch.ones(2)], 1.0)
        with pytest.raises(SettingError, match="rise"):
            group.all_reduce_begin(3, [torch.ones(2)], 1.0)
        group.wait([handle])
        group.all_reduce_begin(0, [torch.ones(2)], 1.0)
        group.close()
        with pytest.raises(WorkerError, match="it is closed"):
            group.all_reduce([torch.ones(2)], 1.0)

    def test_the_store_listens_at_one_address_only(self, address: StoreAddress) -> None:
        found = []
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state = line.split()[:4]
                if state == "0A" and local.endswith(f":{address.port:04X}"):
                    found.append(local)
        assert found == [f"0100007F:{address.port:04X}"]
