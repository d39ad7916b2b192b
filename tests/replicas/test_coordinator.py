"""Stories of a driver, with workers that are played here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, TypeVar

import pytest

from millrace.errors import WorkerError
from millrace.replicas.coordinator import Coordinator
from millrace.replicas.protocol import (
    DriverCommand,
    Expect,
    Failed,
    Joined,
    Lost,
    ReadWanted,
    Resized,
    Said,
    StartMembers,
    StepDone,
    StepWanted,
    Stop,
    Story,
    Tell,
    VariablesRead,
)

T = TypeVar("T")


class Driver:
    """A coordinator, and what it has commanded since one last looked."""

    def __init__(self, replicas: int, **settings: Any) -> None:
        self.coordinator = Coordinator(replicas, **settings)
        self.commands: list[DriverCommand] = self.coordinator.start()

    def hear(self, *events: Any) -> Driver:
        for event in events:
            commands = self.coordinator.handle(event)
            assert any(isinstance(command, Story) for command in commands), f"{event} leaves no story"
            self.commands += commands
        return self

    def take(self, kind: type[T]) -> list[T]:
        """All commands of a kind since the last look; the others are forgotten."""
        taken = [command for command in self.commands if isinstance(command, kind)]
        self.commands = []
        return taken

    def say(self, kind: str, names: Iterable[str], **fields: Any) -> Driver:
        return self.hear(*(Said(name, kind, {"generation": self.coordinator.generation, **fields}) for name in names))

    def told(self) -> list[tuple[str, str]]:
        return [(tell.member, tell.kind) for tell in self.take(Tell)]


def _formed(replicas: int, **settings: Any) -> Driver:
    """A driver whose first group stands: workers a, b, …, then spares."""
    driver = Driver(replicas, **settings)
    names = "abcdefgh"[: replicas + settings.get("spares", 0)]
    driver.hear(*map(Joined, names))
    driver.hear(*(Said(name, "ready", {"committed": 0}) for name in names[:replicas]))
    driver.say("formed", names[:replicas], committed=0).commands.clear()
    return driver


def test_from_the_start_to_the_first_step() -> None:
    driver = Driver(2, spares=1)
    assert driver.take(StartMembers) == [StartMembers(3)]
    driver.hear(Joined("a"), Joined("b"), Joined("c"))
    assert driver.take(Tell) == [Tell("a", "role", {"committed": 0}), Tell("b", "role", {"committed": 0})]
    driver.hear(Said("b", "ready", {"committed": 0}), StepWanted(1, (3.0, 5.0)))
    assert driver.told() == [], "waits for the other"
    driver.hear(Said("a", "ready", {"committed": 0}))
    form = {"generation": 1, "size": 2, "source": None, "behind": [], "step": 0}
    assert driver.take(Tell) == [Tell("a", "form", {**form, "rank": 0}), Tell("b", "form", {**form, "rank": 1})]
    driver.say("formed", "ab", committed=0)
    step = {"generation": 1, "step": 1, "total": 8.0}
    assert driver.take(Tell) == [
        Tell("a", "step", {**step, "slices": [0], "weights": [3.0]}),
        Tell("b", "step", {**step, "slices": [1], "weights": [5.0]}),
    ]


def test_a_step_is_done_when_all_are_done() -> None:
    driver = _formed(2).hear(StepWanted(1, (1.0, 1.0))).say("computed", "ab", step=1).say("done", "b", step=1)
    assert driver.take(StepDone) == []
    (done,) = driver.say("done", "a", step=1).take(StepDone)
    assert done.slices == {"a": (0,), "b": (1,)}
    assert (done.step, done.missing) == (1, ())


def test_a_spare_takes_the_seat_of_a_lost_worker_and_the_step_is_done_again() -> None:
    driver = _formed(3, spares=1).hear(StepWanted(1, (1.0, 2.0, 3.0)))
    driver.commands.clear()
    driver.hear(Lost("b", "killed"))
    assert driver.commands[0].__class__ is Story
    assert driver.take(Tell) == [
        Tell("a", "abandon", {"generation": 1}),
        Tell("c", "abandon", {"generation": 1}),
        Tell("d", "role", {"committed": 0}),
    ]
    driver.say("computed", "ac", step=1).say("abandoned", "ac", committed=0)
    assert driver.told() == [], "the spare is waited for"
    driver.hear(Said("d", "ready", {"committed": 0}))
    assert driver.told() == [("a", "form"), ("d", "form"), ("c", "form")], "it sits where b sat"
    steps = driver.say("formed", "adc", committed=0).take(Tell)
    assert [(tell.member, tell.fields["slices"]) for tell in steps] == [("a", [0]), ("d", [1]), ("c", [2])]


def test_without_a_spare_the_others_share_the_slices_and_the_newcomer_is_taken_in_between_two_steps() -> None:
    driver = _formed(3).hear(StepWanted(1, (1.0, 2.0, 3.0)))
    driver.commands.clear()
    assert driver.hear(Lost("b", "killed")).take(StartMembers) == [StartMembers(1)]
    driver.say("abandoned", "ac", committed=0)
    steps = driver.say("formed", "ac", committed=0).take(Tell)[2:]
    assert [(tell.member, tell.fields["slices"]) for tell in steps] == [("a", [0, 1]), ("c", [2])]
    assert steps[0].fields["weights"] == [1.0, 2.0]
    driver.say("computed", "ac", step=1)
    assert driver.say("done", "a", step=1).hear(Joined("n")).told() == [("n", "role")]
    (done,) = driver.say("done", "c", step=1).take(StepDone)
    assert done.slices == {"a": (0, 1), "c": (2,)}
    driver.hear(Said("n", "ready", {"committed": 0}))
    assert driver.told() == [], "in no hurry: the group stands"
    forms = driver.hear(StepWanted(2, (1.0, 2.0, 3.0))).take(Tell)
    assert [tell.member for tell in forms] == ["a", "n", "c"]
    assert [forms[0].fields[key] for key in ("source", "behind", "step")] == [0, [1], 1]
    assert [tell.fields["slices"] for tell in driver.say("formed", "anc", committed=1).take(Tell)] == [[0], [1], [2]]


def test_a_newcomer_that_is_not_ready_is_not_waited_for() -> None:
    driver = _formed(2).hear(Lost("b", "killed"), Joined("n")).say("formed", "a", committed=0)
    driver.commands.clear()
    steps = driver.hear(StepWanted(1, (1.0, 1.0))).take(Tell)
    assert [(tell.member, tell.fields["slices"]) for tell in steps] == [("a", [0, 1])]


@pytest.mark.parametrize("arrived", [True, False])
def test_a_step_that_a_survivor_has_committed_is_not_done_again(arrived: bool) -> None:
    driver = (
        _formed(3, spares=1).hear(StepWanted(1, (1.0, 1.0, 1.0))).say("computed", "cab" if arrived else "cb", step=1)
    )
    driver.say("done", "c", step=1).hear(Lost("a", "killed")).say("abandoned", "b", committed=0)
    driver.commands.clear()
    forms = driver.hear(Said("d", "ready", {"committed": 0})).take(Tell)
    assert [tell.member for tell in forms] == ["d", "b", "c"]
    assert [forms[0].fields[key] for key in ("source", "behind", "step")] == [2, [0, 1], 1]
    assert driver.say("formed", "dc", committed=1).take(StepDone) == [], "not before everybody has it"
    (done,) = driver.say("formed", "b", committed=1).take(StepDone)
    there = {"a": (0,)} if arrived else {}
    assert (done.slices, done.missing) == ({**there, "b": (1,), "c": (2,)}, () if arrived else (0,))


def test_when_the_only_one_with_the_step_dies_giving_it_away_the_step_is_done_again() -> None:
    driver = _formed(3, max_losses=1).hear(StepWanted(1, (1.0, 1.0, 1.0))).say("done", "c", step=1)
    driver.hear(Lost("a", "killed")).say("computed", "b", step=1).say("abandoned", "b", committed=0)
    driver.hear(Lost("c", "killed while it broadcast")).say("abandoned", "b", committed=0)
    steps = driver.say("formed", "b", committed=0).take(Tell)
    assert (steps[-1].kind, steps[-1].fields["slices"]) == ("step", [0, 1, 2])
    (done,) = driver.say("computed", "b", step=1).say("done", "b", step=1).take(StepDone)
    assert done.missing == ()


def test_a_loss_between_two_steps_needs_no_abandoning() -> None:
    driver = _formed(2, spares=1).hear(Lost("a", "killed"))
    assert driver.told() == [("c", "role")]
    assert driver.hear(Said("c", "ready", {"committed": 0})).told() == [("c", "form"), ("b", "form")]


def test_answers_of_an_earlier_generation_are_dropped() -> None:
    driver = _formed(2).hear(StepWanted(1, (1.0, 1.0)), Lost("b", "killed"))
    driver.say("abandoned", "a", committed=0).say("formed", "a", committed=0)
    late = Said("a", "done", {"generation": 1, "step": 1})
    assert driver.hear(late).take(StepDone) == []
    assert driver.hear(Said("b", "done", {"generation": 2, "step": 1})).take(StepDone) == [], "b is gone"
    (done,) = driver.say("computed", "a", step=1).say("done", "a", step=1).take(StepDone)
    assert list(done.slices) == ["a"]


def test_who_owes_an_answer_is_expected_to_give_it() -> None:
    driver = _formed(2).hear(StepWanted(1, (1.0, 1.0)))
    assert driver.take(Expect) == [Expect("a", "step"), Expect("b", "step")]
    assert driver.say("done", "a", step=1).take(Expect) == [Expect("a", None)]
    assert driver.hear(Said("b", "broken", {"generation": 1, "why": "?"})).take(Expect) == [Expect("b", "abandon")]


def test_a_broken_group_is_formed_again_but_not_for_ever() -> None:
    driver = _formed(2, max_breaks=2).hear(StepWanted(1, (1.0, 1.0)))
    for _ in range(2):
        driver.say("broken", "b", why="connection reset").say("computed", "ab", step=1).say(
            "abandoned", "ab", committed=0
        )
        assert driver.say("formed", "ab", committed=0).told()[-2:] == [("a", "step"), ("b", "step")]
    (failed,) = driver.say("broken", "a", why="connection reset").take(Failed)
    assert "3 times in a row" in failed.reason
    assert "connection reset" in failed.reason
    assert driver.coordinator.handle(Lost("a", "killed")) == []


def test_without_variables_there_is_no_run() -> None:
    driver = _formed(1, spares=1).hear(StepWanted(1, (1.0,))).say("done", "a", step=1)
    driver.commands.clear()
    (failed,) = driver.hear(Lost("a", "killed")).take(Failed)
    assert "newest variables" in failed.reason
    assert "a: killed" in failed.reason


def test_before_the_first_step_is_done_a_new_start_is_as_good() -> None:
    driver = _formed(1).hear(StepWanted(1, (1.0,)), Lost("a", "killed"))
    driver.commands.clear()
    assert driver.hear(Joined("n")).take(Tell) == [Tell("n", "role", {"committed": 0})]
    driver.hear(Said("n", "ready", {"committed": 0})).say("formed", "n", committed=0)
    assert driver.told() == [("n", "form"), ("n", "step")]


def test_starts_that_fail_again_and_again_end_the_run() -> None:
    driver = Driver(2, max_losses=3)
    driver.hear(Lost("p", "exit code 1"), Lost("q", "exit code 1"), Lost("r", "exit code 1"))
    assert driver.take(Failed) == []
    (failed,) = driver.hear(Lost("s", "no hello in 60 s")).take(Failed)
    assert "s: no hello in 60 s" in failed.reason


def test_members_are_started_again_after_a_step() -> None:
    driver = _formed(2, max_losses=1).hear(StepWanted(1, (1.0, 1.0)), Lost("b", "killed"))
    assert driver.take(StartMembers) == []
    driver.say("abandoned", "a", committed=0).say("formed", "a", committed=0)
    driver.say("done", "a", step=1).hear(StepWanted(2, (1.0, 1.0)))
    assert driver.take(StartMembers) == [StartMembers(1)]


def test_more_replicas() -> None:
    driver = _formed(1, spares=1)
    assert driver.hear(Resized(2)).take(StartMembers) == [StartMembers(1)]
    assert driver.hear(StepWanted(1, (1.0, 1.0))).told() == [("b", "role")], "the spare is waited for"
    assert driver.hear(Said("b", "ready", {"committed": 0})).told() == [("a", "form"), ("b", "form")]
    assert driver.say("formed", "ab", committed=0).told() == [("a", "step"), ("b", "step")]


def test_fewer_replicas() -> None:
    driver = _formed(3, spares=1).hear(Resized(1))
    assert driver.take(Stop) == [], "not before the next step"
    driver.hear(StepWanted(1, (1.0,)))
    commands = driver.commands
    assert [command.member for command in commands if isinstance(command, Stop)] == ["b", "c"]
    assert driver.told() == [("a", "form")]
    assert list(driver.coordinator.members) == ["a", "d"]
    assert driver.hear(Lost("b", "not needed any more"), Lost("c", "not needed any more")).take(StartMembers) == []
    assert driver.coordinator.losses == 0


def test_the_variables_are_read_between_two_steps_and_the_step_waits() -> None:
    driver = _formed(2).hear(StepWanted(1, (1.0, 1.0)), ReadWanted())
    assert driver.told() == [("a", "step"), ("b", "step")]
    assert driver.say("done", "ab", step=1).told() == [("a", "read")]
    assert driver.hear(StepWanted(2, (1.0, 1.0))).told() == []
    driver.say("values", "a", committed=1)
    (read,) = [command for command in driver.commands if isinstance(command, VariablesRead)]
    assert (read.member, read.step) == ("a", 1)
    assert driver.told() == [("a", "step"), ("b", "step")]


def test_a_reader_that_dies_is_replaced_by_another() -> None:
    driver = _formed(2).hear(ReadWanted(), Lost("a", "killed"))
    driver.commands.clear()
    assert driver.say("formed", "b", committed=0).told() == [("b", "read")]


@pytest.mark.parametrize("wanted", [StepWanted(2, (1.0, 1.0)), StepWanted(1, (1.0,)), StepWanted(0, (1.0, 1.0))])
def test_a_step_out_of_turn_is_refused(wanted: StepWanted) -> None:
    with pytest.raises(WorkerError, match="expected was step 1 of 2"):
        _formed(2).hear(wanted)


def test_a_worker_that_says_what_cannot_be_is_an_error() -> None:
    with pytest.raises(WorkerError, match=r"a says 'done'.*takes it for 'ready' in generation 1"):
        _formed(2).say("done", "a", step=1)


def test_what_is_told_can_be_written_as_json() -> None:
    driver = _formed(2, spares=1).hear(StepWanted(1, (1.0, 1.0)), Lost("b", "killed"))
    driver.say("computed", "a", step=1).say("abandoned", "a", committed=0).hear(Said("c", "ready", {"committed": 0}))
    fields = [tell.fields for tell in driver.take(Tell)]
    assert len(fields) == 6
    assert all(json.loads(json.dumps(each)) == each for each in fields)
