"""Have actors and evaluations play by the weights of a network that is in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import SupportsFloat

from millrace.models.experience import Experience
from millrace.models.matches import Matches
from millrace.models.q_learning import Learner
from millrace.train.callbacks import Callback, RunView


class Following(Callback):
    """Weights go to the actors with every round that they play; a learner's errors become priorities.

    Args:
        learner: in training.
        experience: what its actors play.
        matches: by which it is evaluated while it learns.
    """

    def __init__(self, learner: Learner, experience: Experience, matches: Matches) -> None:
        self._learner, self._experience, self._matches = learner, experience, matches

    def on_start(self, run: RunView) -> None:
        self._matches.follow(self._learner.online)
        self._experience.follow(self._learner.online, forget=run.step > 0)

    def on_step(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
        if step % self._experience.steps_per_round == 0:
            run.pull()
        if self._learner.errors is not None:
            self._experience.prioritize(self._learner.errors)
