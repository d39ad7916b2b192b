"""What the driver of groups over parameter servers decides: stories, and every order of events on a small scale."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.replicas.explore import Violation, explore
from tests.replicas.small_groups import SmallGroups
from tests.replicas.small_pool import Scope
from tests.replicas.test_pool import told

from millrace.replicas.grouped_pool import SEATED, Group, GroupedPool
from millrace.replicas.pool_events import Done, Kill, PoolCommand, Sizes, Wanted
from millrace.replicas.pool_state import SHARD, WORK, Member
from millrace.replicas.protocol import (
    Expect,
    Failed,
    Fields,
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
    """A pool with one shard at m0, without a copy, and groups from m1 on. Members answer at once that they are ready,
    formed, or have left."""

    def __init__(self, groups: int, group: int, **sizes: object) -> None:
        self.pool = GroupedPool(Sizes(1, groups, copies=False, group=group, **sizes))  # type: ignore[arg-type]
        self.new: list[PoolCommand] = []
        (start,) = [c for c in self.pool.start() if isinstance(c, StartMembers)]
        self.started = start.count
        for number in range(start.count):
            self.hears(Joined(f"m{number}"))
        self.hears(Said("m0", "ready", {"address": "a0"}))

    def hears(self, *events: object, answer: bool = True) -> list[PoolCommand]:
        """What follows from these events, without the stories and expectations."""
        self.new = []
        for event in events:
            self._do(self.pool.handle(event), answer)  # type: ignore[arg-type]
        return self.new

    def _do(self, commands: list[PoolCommand], answer: bool) -> None:
        for command in commands:
            if isinstance(command, Story | Expect):
                continue
            self.new.append(command)
            match command:
                case Tell(member, "role", {"role": "group_worker"}) if answer:
                    self._do(self.pool.handle(Said(member, "ready")), answer)
                case Tell(member, "form", fields) if answer:
                    self._do(self.pool.handle(Said(member, "formed", {"generation": fields["generation"]})), answer)
                case Tell(member, "abandon", fields) if answer:
                    self._do(self.pool.handle(Said(member, "abandoned", dict(fields))), answer)

    def done(self, batches: list[Tell], *members: str) -> list[Said]:
        """What members say when they have done their part; the first has pushed."""
        said = []
        for batch in batches:
            if batch.member in (members or [b.member for b in batches]):
                group = next(g for g in self.pool.groups.values() if batch.member in g.formed)
                first = group.formed[0] == batch.member
                pushed = [(batch.fields["step"], 0)] if first else []
                fields = {"pushed": pushed, "versions": [0] if first else [], "late": False}
                said.append(Said(batch.member, "done", {**fields, "generation": batch.fields["generation"]}))
        return said


def parts(batches: list[Tell]) -> list[tuple[str, int, tuple[int, ...]]]:
    return [(b.member, b.fields["step"], tuple(b.fields["slices"])) for b in batches]


def test_every_group_gets_a_batch_of_its_own_in_slices() -> None:
    driver = Driver(2, 2, spares=1)
    assert driver.started == 1 + 4 + 1
    batches = told(driver.hears(Wanted(0), Wanted(1)), "batch")
    assert parts(batches) == [("m1", 0, (0,)), ("m3", 0, (1,)), ("m2", 1, (0,)), ("m4", 1, (1,))]
    assert Done(1, (0,)) in driver.hears(*driver.done(batches, "m1", "m2", "m4"))
    assert Done(0, (0,)) in driver.hears(*driver.done(batches, "m3"))


def test_a_lost_member_stops_its_group_alone_and_a_spare_takes_its_seat() -> None:
    driver = Driver(2, 2, spares=1)
    batches = told(driver.hears(Wanted(0), Wanted(1)), "batch")
    lost = driver.hears(Lost("m3", "killed"))
    assert [c.member for c in told(lost, "abandon")] == ["m1"]
    assert [(c.member, c.fields["rank"], c.fields["size"]) for c in told(lost, "form")] == [("m1", 0, 2), ("m5", 1, 2)]
    assert parts(told(lost, "batch")) == [("m1", 0, (0,)), ("m5", 0, (1,))]
    assert driver.pool.repeats == 1
    assert Done(1, (0,)) in driver.hears(*driver.done(batches, "m2", "m4"))


def test_without_a_spare_a_group_gets_smaller_and_later_grows_between_two_batches() -> None:
    driver = Driver(2, 2, spares=0)
    driver.hears(Wanted(0), Wanted(1))
    lost = driver.hears(Lost("m1", "killed"))
    again = told(lost, "batch")
    assert parts(again) == [("m3", 0, (0, 1))]
    assert not told(driver.hears(Joined("m5")), "form")  # the batch is not disturbed
    grown = driver.hears(Wanted(2), *driver.done(again))
    assert [(c.member, c.fields["rank"]) for c in told(grown, "form")] == [("m5", 0), ("m3", 1)]
    assert parts(told(grown, "batch")) == [("m5", 2, (0,)), ("m3", 2, (1,))]


def test_what_the_first_has_pushed_is_not_given_out_again() -> None:
    driver = Driver(1, 2, spares=0)
    batches = told(driver.hears(Wanted(0)), "batch")
    driver.hears(*driver.done(batches, "m1"))
    assert Done(0, (0,)) in driver.hears(Lost("m2", "killed"))
    assert driver.pool.repeats == 0


def test_a_push_that_is_told_while_the_group_is_being_left_counts() -> None:
    driver = Driver(1, 2, spares=0)
    batches = told(driver.hears(Wanted(0)), "batch")
    said = driver.done(batches, "m1")
    assert not told(driver.hears(Lost("m2", "killed"), *said, answer=False), "batch")
    assert Done(0, (0,)) in driver.hears(Said("m1", "abandoned", {"generation": 0}))
    assert driver.pool.repeats == 0


def test_groups_are_added_and_taken_away() -> None:
    driver = Driver(2, 2, spares=0)
    (start,) = [c for c in driver.hears(Resized(3)) if isinstance(c, StartMembers)]
    assert start.count == 2
    formed = told(driver.hears(Joined("m5"), Joined("m6")), "form")
    assert [(c.member, c.fields["rank"], c.fields["size"]) for c in formed] == [("m5", 0, 2), ("m6", 1, 2)]
    batches = told(driver.hears(Wanted(0), Wanted(1), Wanted(2)), "batch")
    assert {b.member for b in batches} == {f"m{number}" for number in range(1, 7)}
    driver.hears(*driver.done(batches, "m5"))
    assert not [c for c in driver.hears(Resized(1)) if isinstance(c, Kill)]  # they are at work
    ended = driver.hears(*driver.done(batches, "m2", "m4", "m6"))
    assert {Done(1, (0,)), Done(2, (0,))} <= {c for c in ended if isinstance(c, Done)}
    assert {c.member for c in ended if isinstance(c, Kill)} == {"m2", "m4", "m5", "m6"}
    assert not driver.hears(*(Lost(name, "killed") for name in ("m2", "m4", "m5", "m6")))
    assert driver.pool.losses == driver.pool.repeats == 0
    driver.hears(*driver.done(batches, "m1", "m3"))
    assert parts(told(driver.hears(Wanted(3)), "batch")) == [("m1", 3, (0,)), ("m3", 3, (1,))]
    assert driver.pool.complete


def test_a_group_that_breaks_again_and_again_ends_the_run() -> None:
    driver = Driver(1, 2, spares=0, max_losses=3)
    driver.hears(Wanted(0))
    failed: list[PoolCommand] = []
    for generation in range(8):
        broken = Said("m2", "broken", {"generation": generation, "why": "no route"})
        failed += [c for c in driver.hears(broken) if isinstance(c, Failed)]
    assert "the collective of g0, at m2: no route" in failed[0].reason  # type: ignore[union-attr]


# -- every order of events -----------------------------------------------------------------------------------------

STEPS = (Wanted(0), Wanted(1), ReadWanted())
SCOPES = {
    "a group of two, a crash": Scope(Sizes(1, 1, False, 0, group=2), STEPS, crashes=1),
    "a group of two and a spare, a crash": Scope(Sizes(1, 1, False, 1, group=2), STEPS[:2], crashes=1),
    "formed: a group of two, two crashes": Scope(Sizes(1, 1, False, 0, group=2), STEPS[:1], crashes=2),
    "a group of two, one that gets stuck": Scope(Sizes(1, 1, False, 0, group=2), STEPS[:1], stuck=1),
    "a group of three, a crash": Scope(Sizes(1, 1, False, 0, group=3), STEPS[:1], crashes=1),
    "formed: two groups, of which one works, a crash": Scope(Sizes(1, 2, False, 0, group=2), STEPS[:1], crashes=1),
    "formed: two groups, a crash": Scope(Sizes(1, 2, False, 0, group=2), STEPS[:2], crashes=1),
    "formed: a group more, a crash": Scope(Sizes(1, 1, False, 0, group=2), (Resized(2), Wanted(0)), crashes=1),
    "formed: a group less, a crash": Scope(Sizes(1, 2, False, 0, group=2), (Wanted(0), Resized(1)), crashes=1),
    "a shard with a copy, a crash": Scope(Sizes(1, 1, True, 0, group=2), STEPS[:1], crashes=1),
}


LONG = ("formed: a group more, a crash", "formed: a group of two, two crashes", "formed: two groups, a crash")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long if n in LONG else ()) for n in SCOPES])
def test_every_order_of_events_ends_well(name: str) -> None:
    scope = replace(SCOPES[name], driver=GroupedPool)
    found = explore(SmallGroups(scope, formed=name.startswith("formed")), limit=400_000)
    print(name, found)
    assert found.ends


class Hasty(GroupedPool):
    """Takes a batch for pushed when any of the group has done its part."""

    def _said(self, name: str, kind: str, fields: Fields) -> None:
        if kind == "done":
            fields = {**fields, "pushed": ((self.members["g0"].work),), "versions": (9,)}
        super()._said(name, kind, fields)


class Silent(GroupedPool):
    """Does not tell those who are left of a group that it is given up."""

    def _tell(self, name: str, kind: str, fields: Fields | None = None) -> None:
        if kind != "abandon":
            super()._tell(name, kind, fields)


class Forgetful(GroupedPool):
    """Does not give out again what a group had that broke."""

    def _give_back(self, member: object) -> None:
        pass


@pytest.mark.parametrize(
    ("driver", "found"), [(Hasty, "step 0 is done, and m0 has only"), (Silent, "nothing"), (Forgetful, "nothing")]
)
def test_a_driver_that_is_wrong_is_found(driver: type[GroupedPool], found: str) -> None:
    with pytest.raises(Violation, match=found):
        explore(SmallGroups(replace(SCOPES["a group of two, a crash"], driver=driver)), limit=400_000)


def test_a_member_works_at_what_its_group_does() -> None:
    """So that its failure counts for that step."""
    pool = GroupedPool(Sizes(1, 1, group=2))
    pool.groups["g0"] = Group(("m1", "m2"))
    pool.members |= {"g0": Member(WORK, work=(3, 0)), "m1": Member(SEATED), "m0": Member(SHARD)}
    assert pool.work_of("m1") == pool.work_of("g0") == (3, 0)
    assert pool.work_of("m0") is None
    assert pool.work_of("nobody") is None
