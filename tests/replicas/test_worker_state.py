"""Stories of one worker."""

from __future__ import annotations

import json

import pytest

from millrace.errors import WorkerError
from millrace.replicas.protocol import (
    Adopt,
    AllReduce,
    Broadcast,
    CollectiveFailed,
    Computed,
    ComputeSlices,
    Formed,
    FormGroup,
    LeaveGroup,
    Reduced,
    Say,
    Story,
    Told,
    Update,
    Updated,
)
from millrace.replicas.worker_state import WorkerState

ALONE = {"generation": 1, "rank": 0, "size": 2, "source": None, "behind": [], "step": 4}
STEP = {"generation": 1, "step": 5, "slices": [0, 2], "weights": [8.0, 7.0], "total": 31.0}


def _worker(*events: object, committed: int = 4) -> WorkerState:
    worker = WorkerState()
    worker.handle(Told("role", {"committed": committed}))
    for event in events:
        worker.handle(event)  # type: ignore[arg-type]
    return worker


FORM, FORMED, BEGIN = Told("form", ALONE), Formed(1), Told("step", STEP)
COMPUTED, REDUCED, UPDATED = Computed(1, 5), Reduced(1, 5), Updated(1, 5)
ABANDON = Told("abandon", {"generation": 1})


def _left(committed: int) -> list[object]:
    return [LeaveGroup(1), Say("abandoned", {"generation": 1, "committed": committed})]


def test_a_step_from_the_role_to_done() -> None:
    worker = WorkerState()
    assert worker.handle(Told("role", {"committed": 4})) == [Say("ready", {"committed": 4})]
    assert worker.handle(FORM) == [FormGroup(1, 0, 2)]
    assert worker.handle(FORMED) == [Say("formed", {"generation": 1, "committed": 4})]
    assert worker.handle(BEGIN) == [ComputeSlices(1, 5, (0, 2), (8.0, 7.0), 31.0)]
    assert worker.handle(COMPUTED) == [Say("computed", {"generation": 1, "step": 5}), AllReduce(1, 5)]
    assert worker.handle(REDUCED) == [Update(1, 5)]
    assert worker.committed == 4, "not before the update is over"
    assert worker.handle(UPDATED) == [Say("done", {"generation": 1, "step": 5})]
    assert worker.committed == 5


def test_who_is_behind_adopts_what_was_received_whole() -> None:
    worker = _worker(committed=-1)
    form = Told("form", {**ALONE, "rank": 1, "source": 0, "behind": [1]})
    assert worker.handle(form) == [FormGroup(1, 1, 2), Broadcast(1, 0, (1,), 4)]
    assert worker.handle(FORMED) == [Adopt(1, 4)]
    assert worker.committed == -1
    assert worker.handle(Updated(1, 4)) == [Say("formed", {"generation": 1, "committed": 4})]


def test_who_gives_its_variables_keeps_them() -> None:
    worker = _worker(Told("form", {**ALONE, "source": 0, "behind": [1]}))
    assert worker.handle(FORMED) == [Say("formed", {"generation": 1, "committed": 4})]


@pytest.mark.parametrize(
    "events",
    [
        [FORM],
        [FORM, FORMED],
        [FORM, FORMED, BEGIN],
        [FORM, FORMED, BEGIN, COMPUTED],
        [FORM, FORMED, BEGIN, COMPUTED, CollectiveFailed(1, "peer")],
        [FORM, FORMED, BEGIN, CollectiveFailed(1, "peer")],
        [FORM, CollectiveFailed(1, "peer")],
    ],
)
def test_abandon_before_the_update_is_answered_at_once(events: list[object]) -> None:
    worker = _worker(*events)
    assert worker.handle(ABANDON) == _left(4)
    for late in (FORMED, COMPUTED, REDUCED, CollectiveFailed(1, "late")):
        (story,) = worker.handle(late)
        assert isinstance(story, Story)
    assert worker.committed == 4


def test_abandon_in_the_update_waits_for_its_end() -> None:
    worker = _worker(FORM, FORMED, BEGIN, COMPUTED, REDUCED)
    (story,) = worker.handle(ABANDON)
    assert isinstance(story, Story)
    assert worker.handle(UPDATED) == [Say("done", {"generation": 1, "step": 5}), *_left(5)]


def test_abandon_while_adopting_waits_for_its_end() -> None:
    worker = _worker(Told("form", {**ALONE, "rank": 1, "source": 0, "behind": [1]}), FORMED, ABANDON, committed=3)
    assert worker.handle(Updated(1, 4)) == [Say("formed", {"generation": 1, "committed": 4}), *_left(4)]


def test_a_second_abandon_is_not_answered_again() -> None:
    (story,) = _worker(FORM, ABANDON).handle(ABANDON)
    assert isinstance(story, Story)


def test_a_failed_collective_is_told_and_the_driver_decides() -> None:
    worker = _worker(FORM, FORMED, BEGIN, COMPUTED)
    assert worker.handle(CollectiveFailed(1, "reset")) == [Say("broken", {"generation": 1, "why": "reset"})]
    assert worker.handle(REDUCED)[0].__class__ is Story


def test_news_and_messages_of_an_earlier_generation_are_dropped() -> None:
    worker = _worker(FORM, FORMED, BEGIN, COMPUTED, ABANDON, Told("form", {**ALONE, "generation": 2}), Formed(2))
    worker.handle(Told("step", {**STEP, "generation": 2}))
    worker.handle(Computed(2, 5))
    for late in (REDUCED, ABANDON, Told("form", ALONE), BEGIN):
        assert [type(command) for command in worker.handle(late)] == [Story]
    assert worker.handle(Reduced(2, 5)) == [Update(2, 5)]


def test_between_two_steps_a_new_group_is_formed_without_abandoning() -> None:
    worker = _worker(FORM, FORMED)
    assert worker.handle(Told("form", {**ALONE, "generation": 2})) == [LeaveGroup(1), FormGroup(2, 0, 2)]


def test_the_variables_are_read_between_two_steps() -> None:
    said = _worker(FORM, FORMED).handle(Told("read", {"generation": 1}))
    assert said == [Say("values", {"generation": 1, "committed": 4})]


@pytest.mark.parametrize(
    ("events", "impossible"),
    [
        ([FORM, FORMED], Told("step", {**STEP, "step": 6})),
        ([FORM, FORMED], Told("step", {**STEP, "step": 4})),
        ([FORM], BEGIN),
        ([FORM, FORMED, BEGIN], Told("form", {**ALONE, "generation": 2})),
        ([FORM, FORMED, BEGIN], Told("read", {"generation": 1})),
        ([FORM, FORMED], Told("dance", {"generation": 1})),
    ],
)
def test_what_cannot_be_is_refused_with_where_we_stand(events: list[object], impossible: Told) -> None:
    worker = _worker(*events)
    with pytest.raises(WorkerError, match=r"told.*in generation 1, step 4 committed"):
        worker.handle(impossible)


def test_what_is_said_can_be_written_as_json() -> None:
    worker = WorkerState()
    events = [Told("role", {"committed": 4}), FORM, FORMED, BEGIN, COMPUTED, REDUCED, ABANDON, UPDATED]
    said = [command.fields for event in events for command in worker.handle(event) if isinstance(command, Say)]
    assert len(said) == 5
    assert all(json.loads(json.dumps(fields)) == fields for fields in said)
