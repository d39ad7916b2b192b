"""All orders of events on a small scale: driver and workers as they are, and with a rule broken on purpose.

What must hold is in small_world.py: variables are at all times those of a run without faults (so no step is applied
twice), what is said to be committed is, what is reported stays, results are lost only with who had them, the driver
gives up only when nobody has what was reported, and every run ends, whatever the order of what happens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tests.replicas.explore import Violation, explore
from tests.replicas.small_world import Scope, SmallWorld

from millrace.replicas.coordinator import Coordinator
from millrace.replicas.coordinator_seats import FREE, READY
from millrace.replicas.protocol import (
    CollectiveFailed,
    DriverCommand,
    DriverEvent,
    Expect,
    ReadWanted,
    Reduced,
    Resized,
    Say,
    StepWanted,
    Told,
    Updated,
    WorkerCommand,
    WorkerEvent,
)
from millrace.replicas.worker_state import WorkerState


def _steps(replicas: int, *steps: int) -> tuple[Any, ...]:
    return tuple(StepWanted(step, (1.0,) * replicas) for step in steps)


GROWING = (*_steps(2, 1), Resized(3), *_steps(3, 2), ReadWanted())
SHRINKING = (*_steps(2, 1), Resized(1), *_steps(1, 2), ReadWanted())

SCOPES = {
    "2 workers, nobody new, two die": Scope(crashes=2, max_losses=1),
    "2 workers, one dies, starts fail or not": Scope(crashes=1, arrivals=1),
    "2 workers, two die, one is replaced": Scope(crashes=2, arrivals=1, max_losses=2, wishes=_steps(2, 1)),
    "2 workers and a spare, one dies": Scope(spares=1, crashes=1),
    "2 workers and a spare, one dies, one is replaced": Scope(spares=1, crashes=1, arrivals=1),
    "2 workers and a spare, two die": Scope(spares=1, crashes=2, max_losses=1),
    "2 workers and a spare, one gets stuck": Scope(spares=1, stuck=1),
    "2 workers and a spare, one dies and one gets stuck": Scope(
        spares=1, crashes=1, stuck=1, max_losses=1, prompt=True
    ),
    "2 workers, a collective fails by itself": Scope(glitches=2),
    "3 workers, one dies": Scope(3, crashes=1, max_losses=1, wishes=_steps(3, 1, 2)),
    "3 workers, one gets stuck": Scope(3, stuck=1, max_losses=1, prompt=True, wishes=_steps(3, 1, 2)),
    "3 workers, two die": Scope(3, crashes=2, max_losses=1, prompt=True, wishes=_steps(3, 1)),
    "2 become 3 and one dies": Scope(crashes=1, arrivals=1, max_losses=1, wishes=GROWING, prompt=True),
    "2 become 1 and one dies": Scope(crashes=1, arrivals=1, max_losses=2, wishes=SHRINKING),
}


@pytest.mark.parametrize(
    "scope",
    [
        pytest.param(scope, id=name, marks=pytest.mark.long if name == "3 workers, two die" else ())
        for name, scope in SCOPES.items()
    ],
)
def test_every_run_ends_with_the_variables_of_a_run_without_faults(scope: Scope) -> None:
    found = explore(SmallWorld(scope))
    print(found)
    assert found.states > 100, "so few states are no search"


# --- rules broken on purpose ------------------------------------------------------------------------------------------


class DoesAgainWhatIsCommitted(Coordinator):
    def _finish(self, committed: int) -> None:
        if self.phase != "idle" or not self.flight or self.flight.computed == set(self.group):
            super()._finish(committed)


class ReportsWhatOneHas(Coordinator):
    def _form(self) -> None:
        self._finish(self._furthest())
        super()._form()


class GoesBackToTheSlowest(Coordinator):
    def _furthest(self) -> int:
        return min((self.members[name].committed for name in self._workers(FREE, READY)), default=-1)


class DoesNotWaitForAnswers(Coordinator):
    def _gathered(self) -> bool:
        return not self._awaited()


class ExpectsNothing(Coordinator):
    def handle(self, event: DriverEvent) -> list[DriverCommand]:
        return [command for command in super().handle(event) if not isinstance(command, Expect)]


class CountsTheStoppedAsLost(Coordinator):
    def _stop(self, name: str) -> None:
        super()._stop(name)
        self.stopped = frozenset()


class DespairsTooEarly(Coordinator):
    def _hopeless(self) -> bool:
        return self.starting == 0 and all(m.committed < self.reported for m in self.members.values())


class ForgetsTheStep(Coordinator):
    def _gather(self, why: str) -> None:
        self.flight = None
        super()._gather(why)


class AnswersInTheMiddleOfAnUpdate(WorkerState):
    def _abandon(self) -> list[WorkerCommand]:
        return self._leave()


class SaysDoneBeforeTheUpdate(WorkerState):
    def handle(self, event: WorkerEvent) -> list[WorkerCommand]:
        commands = super().handle(event)
        if isinstance(event, Reduced) and self.doing == "updating":
            commands.append(Say("done", {"generation": self.generation, "step": event.step}))
        return [] if isinstance(event, Updated) else commands


class TakesNewsOfAnEarlierGroup(WorkerState):
    def handle(self, event: WorkerEvent) -> list[WorkerCommand]:
        return super().handle(event if isinstance(event, Told) else replace(event, generation=self.generation))


class TakesAFailureForASuccess(WorkerState):
    def handle(self, event: WorkerEvent) -> list[WorkerCommand]:
        if isinstance(event, CollectiveFailed) and self.doing == "reducing" and self.step is not None:
            event = Reduced(event.generation, self.step)
        return super().handle(event)


class TellsItsResultsWhenDone(WorkerState):
    def handle(self, event: WorkerEvent) -> list[WorkerCommand]:
        commands = super().handle(event)
        said = Say("computed", {"generation": self.generation, "step": self.committed})
        late = any(isinstance(command, Say) and command.kind == "done" for command in commands)
        return ([said] if late else []) + [c for c in commands if not isinstance(c, Say) or c.kind != "computed"]


class DoesNotTakeWhatIsBroadcast(WorkerState):
    def _formed(self) -> list[WorkerCommand]:
        self.behind = False
        return super()._formed()


SPARE = Scope(spares=1, crashes=1, max_losses=1)
THREE = Scope(3, crashes=1, max_losses=1, prompt=True, wishes=_steps(3, 1))
BROKEN: dict[str, tuple[Scope, str]] = {
    "DoesAgainWhatIsCommitted": (replace(SPARE, driver=DoesAgainWhatIsCommitted), "told 'step'.*cannot do that"),
    "ReportsWhatOneHas": (replace(SPARE, driver=ReportsWhatOneHas), "is reported and m"),
    "GoesBackToTheSlowest": (replace(SPARE, driver=GoesBackToTheSlowest), "nothing happens any more"),
    "DoesNotWaitForAnswers": (replace(SPARE, driver=DoesNotWaitForAnswers), "nothing happens any more"),
    "ExpectsNothing": (replace(SPARE, crashes=0, stuck=1, driver=ExpectsNothing), "nothing happens any more"),
    "CountsTheStoppedAsLost": (Scope(wishes=SHRINKING, driver=CountsTheStoppedAsLost), "waits for -1 starts"),
    "DespairsTooEarly": (replace(SPARE, crashes=2, driver=DespairsTooEarly), "gave up .* has all that was reported"),
    "ForgetsTheStep": (replace(SPARE, driver=ForgetsTheStep), "expected was step 1"),
    "AnswersInTheMiddleOfAnUpdate": (replace(SPARE, worker=AnswersInTheMiddleOfAnUpdate), "in the middle of an update"),
    "SaysDoneBeforeTheUpdate": (replace(SPARE, worker=SaysDoneBeforeTheUpdate), "says .* and has"),
    "TakesNewsOfAnEarlierGroup": (replace(SPARE, worker=TakesNewsOfAnEarlierGroup), "while it is at"),
    "TakesAFailureForASuccess": (replace(SPARE, worker=TakesAFailureForASuccess), "after step"),
    "TellsItsResultsWhenDone": (
        replace(THREE, worker=TellsItsResultsWhenDone),
        "lacks what .* lives to tell|on their way",
    ),
    "DoesNotTakeWhatIsBroadcast": (replace(SPARE, worker=DoesNotTakeWhatIsBroadcast), "is reported and m2 has"),
}


@pytest.mark.parametrize(("scope", "found"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_rule_is_found(scope: Scope, found: str) -> None:
    with pytest.raises(Violation, match=f"(?s){found}.*after"):
        explore(SmallWorld(scope))
