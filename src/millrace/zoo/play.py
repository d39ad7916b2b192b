"""Learn to play a game from what it shows and its score: Q-learning with a deep network, for all games the same.

V. Mnih et al., "Human-level control through deep reinforcement learning", Nature 518, 2015; by settings also H. van
Hasselt et al., "Deep reinforcement learning with double Q-learning", 2016 (`double`), Z. Wang et al., "Dueling network
architectures", 2016 (`dueling`), and T. Schaul et al., "Prioritized experience replay", 2016 (`prioritized`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional

from millrace.data.batches import Batches
from millrace.data.randomness import derived_seed
from millrace.errors import DataError, SettingError
from millrace.models.actors import Playing
from millrace.models.experience import Experience, Pace, Priorities
from millrace.models.following import Following
from millrace.models.games import ATARI, Games, Kind, make_games
from millrace.models.matches import Matches
from millrace.models.q_learning import Learner, Values
from millrace.models.watching import read_wish, watch
from millrace.optim.optimizer import Optimizer
from millrace.optim.rules.adam import Adam
from millrace.optim.schedule import Linear
from millrace.train.callbacks import Callback
from millrace.zoo.base import Facts, Pictures, Prediction, Task, TaskData
from millrace.zoo.settings import Settings, setting

# What settings that are none mean: for games that show numbers, and for those that show pictures.
_BY_KIND: dict[str, tuple[float, float]] = {
    "learning_rate": (1e-3, 1e-4),
    "capacity": (50_000, 100_000),
    "warm_up": (1_000, 20_000),
    "target_every": (100, 250),
    "delta": (100.0, 1.0),
    "games": (16, 8),
    "every": (8, 4),
    "ahead": (16, 1),
    "matches": (100, 5),
    "careless": (0.0, 0.05),
}


@dataclass(frozen=True)
class PlaySettings(Settings):
    """Defaults that balance CartPole's pole for as long as is asked for."""

    steps: int | None = setting(10_000, "of learning", low=1, on_resume=True)
    batch_size: int = setting(128, "transitions per step", low=1)
    evaluate_every: int | None = setting(2_000, "steps between evaluations", low=1, on_resume=True)
    checkpoint_every: int | None = setting(2_000, "steps between checkpoints", low=1, on_resume=True)
    threads: int | None = setting(1, "of the CPU to train with; none takes one per core", low=1, on_resume=True)
    game: str = setting("CartPole-v1", "as gymnasium calls it, such as ALE/Pong-v5")
    actors: int = setting(1, "processes that play", low=1)
    games: int | None = setting(
        None, "that each actor plays side by side; none chooses by the game, here and below", low=1
    )
    rows: int = setting(8, "steps in every game between one set of new weights and the next", low=1)
    every: int | None = setting(None, "transitions played for each step of learning", low=1)
    capacity: int | None = setting(None, "transitions in the memory", low=1)
    warm_up: int | None = setting(None, "transitions to begin with", low=1)
    double: bool = setting(True, "whether the network in training chooses the action whose value the target gives")
    dueling: bool = setting(False, "whether values are a state's plus advantages of actions")
    prioritized: bool = setting(False, "whether transitions are sampled by their error")
    width: int = setting(128, "hidden units of each of two layers, where games show numbers", low=1)
    discount: float = setting(0.99, "of a reward for every step that it lies ahead", low=0, high=1)
    ahead: int | None = setting(None, "steps whose rewards are summed before the target's value counts", low=1)
    learning_rate: float | None = setting(None, "of Adam, at first; it falls to 0", low=0)
    target_every: int | None = setting(None, "steps between copies of the network to the target's", low=1)
    average: float | None = setting(
        0.999, "decay of the running average of the weights; none for no average", low=0, high=1
    )
    delta: float | None = setting(None, "size from which on a value's error counts linearly, not squared", low=0)
    explore: float = setting(0.2, "share of the run after which few actions are random", low=0, high=1)
    epsilon: float = setting(0.02, "share of random actions from there on", low=0, high=1)
    matches: int | None = setting(None, "games in an evaluation", low=1, on_resume=True)
    careless: float | None = setting(None, "share of random actions in an evaluation", low=0, high=1)
    longest: int = setting(27_000, "steps after which one of Atari's games is over", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is None:
            raise SettingError("play needs to know its steps (--set steps=10000): games have no epochs.")
        if self.prioritized and self.steps_per_call > 1:
            raise SettingError("prioritized=true needs steps_per_call=1: each step's errors decide what comes next.")


class Play(Task[PlaySettings]):
    """Batches as `Experience` has them; values [N, A] by observations [N, S, …]."""

    settings_type = PlaySettings
    metric = "score"
    bar = 475.0  # the score at which CartPole-v1 counts as solved

    def __init__(self, settings: PlaySettings) -> None:
        which = int(settings.game.startswith(ATARI))
        missing = {name: kinds[which] for name, kinds in _BY_KIND.items() if getattr(settings, name) is None}
        super().__init__(replace(settings, **cast(dict[str, Any], missing)))

    def data(self, facts: Facts | None = None) -> TaskData:
        """What actors play, for training; for the rest, games that the model then plays, from other beginnings."""
        s = self.settings
        games = make_games(s.game, 1)
        games.close()
        facts = games.kind.to_json() if facts is None else facts
        playing = Playing(
            s.game, s.actors, cast(int, s.games), True, s.longest, clipped=s.game.startswith(ATARI), seed=s.seed
        )
        capacity, warm_up, every, ahead = cast(tuple[int, ...], (s.capacity, s.warm_up, s.every, s.ahead))
        pace = Pace(capacity, warm_up, every, self._epsilon, s.rows, ahead, s.discount)
        priorities = Priorities(0.6 * s.prioritized, self._beta)
        train = Experience(playing, games.kind, pace, priorities, s.batch_size, lambda: self._network(games.kind))
        return TaskData(train, self._matches("validation"), self._matches("test"), facts)

    def _matches(self, part: str) -> Matches:
        s = self.settings
        seed = derived_seed(part, s.seed) % 2**31
        return Matches(f"the {part} of {s.game}", self.games, cast(int, s.matches), cast(float, s.careless), seed)

    def _epsilon(self, step: int) -> float:
        s = self.settings
        explored = step / max(1.0, s.explore * cast(int, s.steps))
        return max(s.epsilon, 1 - explored * (1 - s.epsilon))

    def _beta(self, step: int) -> float:
        return min(1.0, 0.4 + 0.6 * step / cast(int, self.settings.steps))

    def _network(self, kind: Kind) -> nn.Module:
        return Values(kind, self.settings.width, self.settings.dueling)

    def model(self, facts: Facts) -> nn.Module:
        """The network, and the one that its targets are computed with."""
        s = self.settings
        errors = s.batch_size if s.prioritized else 0
        return Learner(self._network(Kind.from_json(facts)), cast(int, s.target_every), s.double, errors)

    def loss(self, model: Learner, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the values' errors, which count linearly from `delta` on; of an evaluation, minus its score."""
        score = batch["scores"].mean()
        if not model.training:
            return -score, {"score": score}
        value_B, target_B = model(batch)
        losses_B = functional.huber_loss(value_B, target_B, reduction="none", delta=cast(float, self.settings.delta))
        return (losses_B * batch["weights"]).mean(), {"value": value_B.mean(), "score": score}

    def optimizer(self, model: nn.Module, steps: int) -> Optimizer:
        """Adam on clipped gradients, at a rate that falls to nothing; averages of the weights are what is evaluated."""
        rate = Linear(cast(float, self.settings.learning_rate), steps)
        return Optimizer(Adam(), rate, clip_norm=10.0, average=self.settings.average)

    def callbacks(self, model: nn.Module, data: TaskData) -> list[Callback]:
        """Have the actors and the evaluations play by the weights in training."""
        experience, matches = cast(Experience, data.train), cast(Matches, data.validation)
        return [Following(cast(Learner, model), experience, matches)]

    def evaluate(self, model: nn.Module, batches: Batches) -> dict[str, float]:
        """The mean score of `matches` games."""
        cast(Matches, batches).follow(cast(Learner, model).online)
        return super().evaluate(model, batches)

    def games(self, count: int) -> Games:
        """As they are evaluated: whole ones, with all their lives."""
        return make_games(self.settings.game, count, longest=self.settings.longest)

    def pictures(self, model: nn.Module, data: TaskData) -> Pictures:
        """A game of the test."""
        games = self.games(1)
        _, pictures = self._watched(model, games, derived_seed("test", self.settings.seed) % 2**31)
        games.close()
        return pictures

    def predict(self, model: nn.Module, file: Path, facts: Facts) -> Prediction:
        """Play one game. The file names it, and may add a number on which all depends that happens by chance."""
        name, seed = read_wish(file)
        games = make_games(name, 1, longest=self.settings.longest)
        if games.kind != Kind.from_json(facts):
            games.close()
            raise DataError(
                f"{file} asks for the game {name!r}, which shows and takes {games.kind}, but the model learned "
                f"{self.settings.game}: {Kind.from_json(facts)}. Ask for a game of that kind."
            )
        score, pictures = self._watched(model, games, seed)
        games.close()
        text = f"{name} with seed {seed}: a score of {score:g}"
        return Prediction(text, {"game": name, "seed": seed, "score": score}, pictures)

    def _watched(self, model: nn.Module, games: Games, seed: int) -> tuple[float, Pictures]:
        return watch(games, cast(Learner, model).online, epsilon=cast(float, self.settings.careless), seed=seed)


TASK = Play
