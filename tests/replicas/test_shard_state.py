"""What a shard decides: one at a time, and in every order that messages and a crash can come in."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.replicas.explore_shards import Broken, Explorer

from millrace.errors import WorkerError
from millrace.replicas import shard_events as ev
from millrace.replicas.shard_state import ShardState

POLICIES = {
    "sync": ev.Sync(2),
    "backup": ev.Sync(1),
    "async": ev.Async(),
    "bounded": ev.Async(bound=0),
}
VICTIMS = ("", "worker", "shard", "copy")


def push(worker: str, step: int = 0, sequence: int | None = None, **more: object) -> ev.Pushed:
    made = ev.Pushed(worker, step if sequence is None else sequence, step, step, key=f"{worker}.{step}")
    return replace(made, **more)  # type: ignore[arg-type]


def kinds(commands: list[ev.Command]) -> list[str]:
    return [type(command).__name__ for command in commands]


# -- every order ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("policy", POLICIES)
def test_two_workers_and_one_shard_for_two_steps(policy: str, victim: str) -> None:
    new_copy = victim in ("shard", "copy")
    worlds = Explorer(POLICIES[policy], shards=1, steps=2, victim=victim, new_copy=new_copy).explore()
    assert worlds > 150


@pytest.mark.parametrize("victim", ["", "shard", "copy"])
@pytest.mark.parametrize("policy", POLICIES)
def test_two_workers_and_two_shards(policy: str, victim: str) -> None:
    assert Explorer(POLICIES[policy], shards=2, victim=victim).explore() > 1000


@pytest.mark.slow
@pytest.mark.parametrize("policy", [pytest.param(p, marks=[pytest.mark.long] * (p != "sync")) for p in POLICIES])
def test_two_workers_one_of_them_lost_and_two_shards(policy: str) -> None:
    assert Explorer(POLICIES[policy], shards=2, victim="worker").explore() > 10_000


class AcknowledgesAtOnce(ShardState):
    """Does not wait for its copy."""

    @property
    def settled(self) -> int:
        return self.index


class Forgets(ShardState):
    """Does not remember who has pushed."""

    def _pushed(self, push: ev.Pushed) -> list[ev.Command]:
        self.known = {}
        return super()._pushed(push)


class ShowsAtOnce(ShardState):
    """Lets workers read a version that its copy does not have."""

    def why_held(self, worker: str) -> str:
        return "" if self.version >= self._fetches.get(worker, 0) else "others"


class NeverForwardsPolicies(ShardState):
    """Tells its copy of pushes only."""

    def _write(self, entry: ev.Entry) -> list[ev.Command]:
        commands = super()._write(entry)
        return [c for c in commands if not (isinstance(c, ev.Forward) and isinstance(c.entry, ev.Configured))]


@pytest.mark.parametrize(
    ("broken", "policy", "workers", "says"),
    [
        (AcknowledgesAtOnce, "async", 2, "which was acknowledged"),
        (Forgets, "async", 2, "applied a push twice"),
        (ShowsAtOnce, "backup", 3, "shown with two contents"),
    ],
)
def test_a_broken_one_is_found(broken: type[ShardState], policy: str, workers: int, says: str) -> None:
    with pytest.raises(Broken, match=says):
        Explorer(POLICIES[policy], workers=workers, shards=1, victim="shard", make=broken).explore()


def test_three_workers_of_which_one_is_needed_see_one_variable_for_each_version() -> None:
    assert Explorer(POLICIES["backup"], workers=3, shards=1, victim="shard").explore() > 1000


def test_a_copy_that_misses_an_entry_says_so() -> None:
    with pytest.raises(WorkerError, match=r"entry \d of a shard's log came to a copy that has the log up to \d"):
        Explorer(ev.Sync(2), shards=1, steps=2, victim="worker", make=NeverForwardsPolicies).explore()


# -- one at a time -------------------------------------------------------------------------------------------------


def test_sync_takes_the_first_slices_in_their_order_and_drops_late_ones() -> None:
    shard = ShardState(ev.Sync(2))
    assert kinds(shard.handle(push("c", slice=2, examples=3))) == ["Ack"]
    done = shard.handle(push("a", slice=0, examples=1))
    assert done[0] == ev.Apply(("a.0", "c.0"), (0.25, 0.75), 1)
    late = shard.handle(push("b", slice=1))
    assert kinds(late) == ["Drop"]
    assert "late" in late[0].why  # type: ignore[union-attr]
    assert shard.dropped == 1


def test_a_slice_counts_once_whoever_computed_it() -> None:
    shard = ShardState(ev.Sync(2))
    shard.handle(push("old", slice=1))
    (drop,) = shard.handle(push("replacement", slice=1))
    assert isinstance(drop, ev.Drop)
    assert "from old" in drop.why


def test_a_push_of_a_step_to_come_is_refused() -> None:
    (drop,) = ShardState(ev.Sync(1)).handle(push("a", step=3))
    assert isinstance(drop, ev.Drop)
    assert "fetch them first" in drop.why


def test_a_fetch_waits_for_its_version_and_says_for_what() -> None:
    shard = ShardState(ev.Sync(2))
    shard.handle(push("a", slice=0))
    (hold,) = shard.handle(ev.FetchWanted("a", 1))
    assert hold == ev.Hold("a", "step 0 to be complete: 2 slices are needed, those here: 0")
    assert ev.Reply("a", 1) in shard.handle(push("b", slice=1))


def test_a_lost_worker_is_not_waited_for() -> None:
    shard = ShardState(ev.Async(bound=1), ("quick", "slow"))
    for step in range(2):
        shard.handle(push("quick", step, version=step))
    (hold,) = shard.handle(ev.FetchWanted("quick", 2))
    assert isinstance(hold, ev.Hold)
    assert "slow" in hold.why
    assert shard.handle(ev.Configured(ev.Async(bound=1), ("quick",))) == [ev.Reply("quick", 2)]


def test_a_newcomer_begins_with_the_slowest() -> None:
    shard = ShardState(ev.Async(bound=0), ("a",))
    shard.handle(push("a"))
    shard.handle(ev.Configured(ev.Async(bound=0), ("a", "new")))
    assert shard.handle(ev.FetchWanted("a", 1)) == [ev.Reply("a", 1)]


def test_one_worker_less_completes_a_step() -> None:
    shard = ShardState(ev.Sync(2), ("a", "b"))
    shard.handle(push("a"))
    assert kinds(shard.handle(ev.Configured(ev.Sync(1), ("a",)))) == ["Apply"]


def test_staleness_is_counted_and_weighs() -> None:
    shard = ShardState(ev.Async(damped=True))
    shard.handle(push("a"))
    apply, ack = shard.handle(push("b", version=0))
    assert apply == ev.Apply(("b.0",), (0.5,), 2)
    assert ack == ev.Ack("b", 0, 2, 1)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4)), max_size=30))
def test_async_every_new_push_is_applied_once(pushes: list[tuple[str, int]]) -> None:
    shard, copy = ShardState(ev.Async()), ShardState(ev.Async(), is_copy=True)
    shard.handle(ev.CopyGained())
    copy.handle(ev.Restored(shard.snapshot()))
    applied: dict[bool, list[str]] = {True: [], False: []}
    newest: dict[str, int] = {}
    expected = []
    for worker, sequence in pushes:
        if sequence > newest.get(worker, -1):
            newest[worker] = sequence
            expected.append(f"{worker}.{sequence}")
        told = shard.handle(push(worker, sequence))
        forwards = [c for c in told if isinstance(c, ev.Forward)]
        assert not forwards or ev.Ack not in map(type, told)
        for forward in forwards:
            done = copy.handle(ev.Forwarded(forward.index, forward.entry))
            acks = shard.handle(ev.CopyAcked(forward.index))
            assert [(a.worker, a.sequence) for a in acks if isinstance(a, ev.Ack)] == [(worker, sequence)]
            applied[True] += [key for c in done if isinstance(c, ev.Apply) for key in c.keys]
        applied[False] += [key for c in told if isinstance(c, ev.Apply) for key in c.keys]
    assert applied[True] == applied[False] == expected
    assert shard.snapshot() == copy.snapshot()
