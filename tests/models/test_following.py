"""Following: evaluations and actors have the weights in training, and errors become priorities."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from millrace.models.experience import Experience
from millrace.models.following import Following
from millrace.models.games import Kind
from millrace.models.matches import Matches
from millrace.models.q_learning import Learner, Values
from millrace.train.callbacks import RunView


@dataclass
class Heard:
    """Stands in for a run, its experience and its matches, and notes what each is told."""

    step: int = 0
    steps_per_round: int = 4
    told: list[tuple[str, Any]] = field(default_factory=list)

    def follow(self, network: nn.Module, **how: bool) -> None:
        self.told.append(("follow", (network, how)))

    def prioritize(self, errors: Tensor) -> None:
        self.told.append(("prioritize", errors))

    def pull(self) -> None:
        self.told.append(("pull", None))


def following(errors: int) -> tuple[Learner, Heard, Heard, Following]:
    learner = Learner(Values(Kind((3,), "float32", 1, 2), 4, dueling=False), 10, double=True, errors=errors)
    experience, matches = Heard(), Heard()
    return learner, experience, matches, Following(learner, cast(Experience, experience), cast(Matches, matches))


@pytest.mark.parametrize("step", [0, 7])
def test_both_follow_the_network_and_a_resumed_run_forgets_what_was_played(step: int) -> None:
    learner, experience, matches, callback = following(0)
    callback.on_start(cast(RunView, Heard(step)))
    assert matches.told == [("follow", (learner.online, {}))]
    assert experience.told == [("follow", (learner.online, {"forget": step > 0}))]


def test_weights_are_pulled_with_every_round_and_errors_told_at_every_step() -> None:
    learner, experience, _, callback = following(5)
    run = Heard()
    assert learner.errors is not None
    for step in range(1, 10):
        learner.errors.fill_(step)
        callback.on_step(cast(RunView, run), step, {})
        name, errors = experience.told[-1]
        assert name == "prioritize"
        assert torch.equal(errors, torch.full((5,), float(step)))
    assert run.told == [("pull", None)] * 2  # after steps 4 and 8
    _, experience, _, callback = following(0)
    callback.on_step(cast(RunView, run), 1, {})
    assert experience.told == []
