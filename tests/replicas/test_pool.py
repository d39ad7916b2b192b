"""What the driver of parameter servers decides: stories, and every order of events on a small scale."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.replicas.explore import Violation, explore
from tests.replicas.small_pool import Scope, SmallPool

from millrace.replicas.pool import Pool
from millrace.replicas.pool_events import Done, FlushWanted, Kill, PoolCommand, Sizes, Wanted
from millrace.replicas.protocol import (
    Expect,
    Failed,
    Joined,
    Lost,
    ReadWanted,
    Resized,
    Said,
    StartMembers,
    Story,
    Tell,
)


class Driver:
    """A pool whose commands are kept."""

    def __init__(self, sizes: Sizes) -> None:
        self.pool = Pool(sizes)
        self.new: list[PoolCommand] = []
        self._keep(self.pool.start())

    def hears(self, *events: object) -> list[PoolCommand]:
        """What follows from these events, without the stories and expectations."""
        self.new = []
        for event in events:
            self._keep(self.pool.handle(event))  # type: ignore[arg-type]
        return self.new

    def _keep(self, commands: list[PoolCommand]) -> None:
        self.new += [c for c in commands if not isinstance(c, Story | Expect)]


def told(commands: list[PoolCommand], kind: str) -> list[Tell]:
    return [c for c in commands if isinstance(c, Tell) and c.kind == kind]


def pushed(name: str, *steps: int, version: int = 0) -> Said:
    return Said(name, "done", {"pushed": [(s, 0) for s in steps], "versions": [version], "late": False})


def running(**sizes: object) -> Driver:
    """One shard at m0 with its copy at m1, workers from m2 on."""
    driver = Driver(Sizes(1, **sizes))  # type: ignore[arg-type]
    (start,) = driver.new
    assert isinstance(start, StartMembers)
    driver.hears(*(Joined(f"m{number}") for number in range(start.count)))
    driver.hears(Said("m0", "ready", {"address": "a0"}))
    driver.hears(Said("m1", "ready", {"address": "a1"}), Said("m0", "copied", {"member": "m1"}))
    driver.hears(*(Said(name, "ready") for name, m in driver.pool.members.items() if m.doing == "role"))
    return driver


def test_shards_have_roles_first_then_copies_then_workers() -> None:
    driver = Driver(Sizes(1, 2))
    joined = driver.hears(*(Joined(f"m{number}") for number in range(5)))
    assert [(t.member, t.fields["role"]) for t in told(joined, "role")] == [("m0", "shard")]
    up = driver.hears(Said("m0", "ready", {"address": "a0"}))
    roles = [(t.member, t.fields["role"], t.fields.get("copy")) for t in told(up, "role")]
    assert roles == [("m1", "shard", True), ("m2", "server_worker", None), ("m3", "server_worker", None)]
    assert told(driver.hears(Said("m1", "ready", {"address": "a1"})), "copy")[0].member == "m0"


def test_what_has_been_computed_is_not_done() -> None:
    driver = running(workers=1)
    driver.hears(Wanted(0), Wanted(1))
    said = driver.hears(Said("m2", "computed", {"step": 0, "slice": 0}))
    assert not [command for command in said if not isinstance(command, Story)]
    assert told(driver.hears(Lost("m2", "killed"), Said("m3", "ready")), "batch")[0].fields["step"] == 0


def test_the_batch_of_a_lost_worker_is_given_to_another() -> None:
    driver = running(workers=2)
    batches = told(driver.hears(Wanted(0), Wanted(1), Wanted(2)), "batch")
    assert [(b.member, b.fields["step"]) for b in batches] == [("m2", 0), ("m3", 1)]
    lost = driver.hears(Lost("m2", "killed"))
    assert any(isinstance(c, StartMembers) for c in lost)
    done = driver.hears(pushed("m3", 1))
    assert Done(1, (0,)) in done
    assert told(done, "batch")[0].fields["step"] == 0  # before step 2, which nobody has had
    assert driver.pool.repeats == 1


def test_what_was_added_up_and_not_pushed_is_lost_with_the_worker() -> None:
    driver = running(workers=1)
    driver.hears(Wanted(0))
    assert not driver.hears(Said("m2", "done", {"pushed": [], "versions": [], "late": False}))
    assert told(driver.hears(FlushWanted()), "flush")[0].member == "m2"
    again = driver.hears(Lost("m2", "killed"), Said("m3", "ready"))
    assert told(again, "batch")[0].fields["step"] == 0


def test_the_copy_of_a_lost_shard_takes_its_place_and_workers_are_told() -> None:
    driver = running(workers=1)
    driver.hears(Wanted(0))
    lost = driver.hears(Lost("m0", "killed"))
    assert told(lost, "promote")[0].member == "m1"
    assert driver.pool.room == 0
    back = driver.hears(Said("m1", "promoted"))
    assert told(back, "moved") == [Tell("m2", "moved", {"shard": 0, "address": "a1"})]
    assert told(back, "role")[0].fields["copy"]  # the spare


@pytest.mark.parametrize("first", ["uncopied", "lost copy", "no copy yet"])
def test_a_shard_lost_without_a_whole_copy_ends_the_run(first: str) -> None:
    driver = running(workers=1)
    driver.hears(Wanted(0))
    if first == "uncopied":
        gone = driver.hears(Said("m0", "uncopied", {"member": "m1", "why": "broken pipe"}))
        assert Kill("m1", "it does not follow shard 0 any more: broken pipe") in gone
    elif first == "lost copy":
        driver.hears(Lost("m1", "killed"))
    else:
        driver.hears(Lost("m1", "killed"), Said("m3", "ready", {"address": "a3"}))
    (failed,) = [c for c in driver.hears(Lost("m0", "killed")) if isinstance(c, Failed)]
    assert "only the last checkpoint has its variables" in failed.reason
    assert failed.variables_lost


def test_a_shard_that_sends_its_copy_all_it_has_is_not_killed_for_its_silence() -> None:
    driver = running(workers=1)
    driver.hears(Wanted(0))
    lost = driver.hears(Lost("m1", "killed"))
    assert told(lost, "copy_lost") == [Tell("m0", "copy_lost", {"member": "m1"})]
    silent = Said("m2", "shard_lost", {"shard": 0, "address": "a0", "why": "it said nothing"})
    assert driver.hears(silent) == [Tell("m2", "moved", {"shard": 0, "address": "a0"})]  # of before the loss, perhaps
    assert told(driver.hears(Said("m3", "ready", {"address": "a3"})), "copy")[0].member == "m0"
    assert not driver.hears(silent)
    assert Tell("m2", "moved", {"shard": 0, "address": "a0"}) in driver.hears(Said("m0", "copied", {"member": "m3"}))
    assert Kill("m0", "m2 has no connection with it: it said nothing") in driver.hears(silent)  # there is a copy now


def test_a_shard_lost_before_the_first_step_is_made_again() -> None:
    driver = Driver(Sizes(1, 1, copies=False))
    driver.hears(*(Joined(f"m{number}") for number in range(3)), Said("m0", "ready", {"address": "a0"}))
    assert told(driver.hears(Lost("m0", "killed")), "role")[0].member == "m2"


def test_workers_that_are_too_many_finish_and_push_before_they_end() -> None:
    driver = running(workers=3)
    driver.hears(Wanted(0), Wanted(1), Wanted(2))
    assert not [c for c in driver.hears(Resized(1)) if isinstance(c, Kill)]
    assert Kill("m3", "it is not needed any more") in driver.hears(pushed("m3", 1))
    idle = driver.hears(pushed("m4"))  # it has added up gradients and not pushed them
    assert [c.member for c in told(idle, "flush")] == ["m4"]
    flushed = Said("m4", "flushed", {"pushed": [(2, 0)], "versions": [2], "late": False})
    ended = driver.hears(flushed)
    assert Kill("m4", "it is not needed any more") in ended
    assert Done(2, (0,)) in ended
    driver.hears(pushed("m2", 0), Lost("m3", "killed"), Lost("m4", "killed"))
    assert [c.member for c in told(driver.hears(Wanted(3), Wanted(4)), "batch")] == ["m2"]
    assert not driver.pool.repeats


def test_workers_that_are_not_needed_are_no_losses() -> None:
    driver = running(workers=30)
    ended = [c.member for c in driver.hears(Resized(1)) if isinstance(c, Kill)]
    assert len(ended) == 29
    assert not driver.hears(*(Lost(name, "killed") for name in ended))
    assert driver.pool.losses == 0


def test_more_workers_are_started_and_given_the_role() -> None:
    driver = running(workers=1)
    count = driver.pool.sizes.spares
    (start,) = (c for c in driver.hears(Resized(3)) if isinstance(c, StartMembers))
    assert start.count + count >= 2
    names = [f"m{3 + count + n}" for n in range(start.count)]
    driver.hears(*(Joined(name) for name in names))
    assert len(driver.pool._of("role", "free")) == 3


def test_a_worker_whose_shard_is_silent_has_it_replaced() -> None:
    driver = running(workers=1)
    driver.hears(Wanted(0))
    complaint = {"shard": 0, "address": "a0", "why": "no answer"}
    assert [c.member for c in driver.hears(Said("m2", "shard_lost", complaint)) if isinstance(c, Kill)] == ["m0"]
    driver.hears(Lost("m0", "killed"), Said("m1", "promoted"))
    assert not driver.hears(Said("m2", "shard_lost", complaint))  # of the old address: it will hear of the new one


def test_nobody_is_further_ahead_than_the_bound() -> None:
    driver = running(workers=2, bound=1)
    driver.hears(*(Wanted(step) for step in range(6)))
    given = []
    for step in range(1, 6):
        batches = told(driver.hears(pushed("m3", step)), "batch")
        given += [(b.member, b.fields["step"]) for b in batches]
        if not batches:
            break
    assert given == [("m3", 2)]  # m2 has done nothing yet
    assert [b.member for b in told(driver.hears(pushed("m2", 0)), "batch")] == ["m2", "m3"]


def test_a_step_is_done_with_as_many_slices_as_it_needs() -> None:
    driver = running(workers=3, sync=True)
    configured = driver.hears(Wanted(0, slices=3, needed=2))
    assert told(configured, "configure")[0].fields == {"needed": 2}
    assert len(told(driver.hears(Said("m0", "configured")), "batch")) == 3
    answers = [
        Said(name, "done", {"pushed": [(0, slice_)], "versions": [version], "late": False})
        for name, slice_, version in (("m2", 0, 0), ("m4", 2, 1))
    ]
    assert Done(0, (0, 2)) in driver.hears(*answers)
    late = Said("m3", "done", {"pushed": [(0, 1)], "versions": [1], "late": True})
    batches = told(driver.hears(Wanted(1, slices=3, needed=2)), "batch")
    assert {b.member for b in batches} == {"m2", "m4"}  # the third slice waits for m3
    assert told(driver.hears(late), "batch")[0].member == "m3"
    assert driver.pool.dropped == 1


def test_losses_without_a_step_in_between_end_the_run() -> None:
    driver = running(workers=1, max_losses=3)
    lost = driver.hears(*(Lost(f"x{number}", "no memory") for number in range(5)))
    (failed,) = [c for c in lost if isinstance(c, Failed)]
    assert "no memory" in failed.reason


# -- every order of events -----------------------------------------------------------------------------------------

STEPS = (Wanted(0), Wanted(1), ReadWanted())
SCOPES = {
    "async, a crash": Scope(Sizes(1, 1, spares=0), STEPS, crashes=1),
    "async, two workers, a crash": Scope(Sizes(1, 2, spares=0), STEPS[:2], crashes=1),
    "async, one that gets stuck": Scope(Sizes(1, 1, spares=0), STEPS[:2], stuck=1),
    "async, pushed together, a crash": Scope(
        Sizes(1, 1, spares=0), (Wanted(0), Wanted(1), Wanted(2), FlushWanted()), crashes=1, push_every=2
    ),
    "async, a copy's connection breaks, a crash": Scope(Sizes(1, 1, spares=0), STEPS[:1], crashes=1, breaks=1),
    "sync, two slices, a crash": Scope(Sizes(1, 2, spares=0, sync=True), (Wanted(0, 2, 2), ReadWanted()), crashes=1),
    "sync, a backup, a crash": Scope(Sizes(1, 2, spares=0, sync=True, copies=True), (Wanted(0, 2, 1),), crashes=1),
    "sync, two shards, a crash": Scope(Sizes(2, 1, spares=0, sync=True), (Wanted(0), ReadWanted()), crashes=1),
}


@pytest.mark.parametrize("name", SCOPES)
def test_every_order_of_events_ends_well(name: str) -> None:
    found = explore(SmallPool(SCOPES[name]), limit=400_000)
    print(name, found)
    assert found.ends


class Deaf(Pool):
    """Believes that a copy follows as long as it lives."""

    def handle(self, event: object) -> list[PoolCommand]:
        if isinstance(event, Said) and event.kind == "uncopied":
            return []
        return super().handle(event)  # type: ignore[arg-type]


class Hasty(Pool):
    """Takes a batch for done when it was computed."""

    def _said(self, name: str, kind: str, fields: object) -> None:
        if kind == "done":
            fields = {**fields, "pushed": self.members[name].holds, "versions": [9] * len(self.places)}  # type: ignore[dict-item]
        super()._said(name, kind, fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("driver", "scope"),
    [(Deaf, "async, a copy's connection breaks, a crash"), (Hasty, "async, pushed together, a crash")],
)
def test_a_driver_that_is_wrong_is_found(driver: type[Pool], scope: str) -> None:
    with pytest.raises(Violation):
        explore(SmallPool(replace(SCOPES[scope], driver=driver)), limit=400_000)
