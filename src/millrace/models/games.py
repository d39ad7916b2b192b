"""Games side by side: every one of gymnasium's that shows numbers, and Atari's, as Mnih et al. prepare their pictures.

Atari ("ALE/Pong-v5", …): a frame is 84×84 grey points; each action lasts 4 of the console's frames, of which the
brighter of the last two is taken for every point; an observation is 4 frames. A game begins with up to 30 steps of
doing nothing (and with a shot, where one is needed to begin), and with probability 0.25 the console repeats the last
action instead of the new one, so that no game is like another: the default of ALE's version 5 (M. Machado et al.,
"Revisiting the arcade learning environment", 2018). All of that is done by ale-py's own vector environment.
"""

from __future__ import annotations

import abc
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from millrace.data.batches import Json
from millrace.errors import DataError
from millrace.models.replay import Array

ATARI = "ALE/"
FRAMES_PER_STEP = 4  # of an Atari console
STICKY = 0.25


@dataclass(frozen=True)
class Kind:
    """What a game shows and takes."""

    frame: tuple[int, ...]
    dtype: str  # as numpy calls it
    stack: int  # frames in an observation
    actions: int

    def to_json(self) -> dict[str, Json]:
        """As a JSON value for `from_json`."""
        return {"frame": list(self.frame), "dtype": self.dtype, "stack": self.stack, "actions": self.actions}

    @classmethod
    def from_json(cls, value: Mapping[str, Json]) -> Kind:
        """What `to_json` wrote."""
        frame = tuple(cast(list[int], value["frame"]))
        return cls(frame, str(value["dtype"]), cast(int, value["stack"]), cast(int, value["actions"]))


@dataclass(frozen=True)
class Seen:
    """What a step brought, of N games."""

    observations: Array  # [N, stack, *frame]
    rewards: Array  # float [N], as the game counts them
    ends: Array  # bool [N]: the game, or a life, was lost by it
    fresh: Array  # bool [N]: nothing was played, but a new game begun; this is its first observation


class Games(abc.ABC):
    """N games of one kind that go on side by side; one that is over begins anew with the next step."""

    kind: Kind

    @abc.abstractmethod
    def reset(self, seed: int) -> Array:
        """Begin all of them: the first observations [N, stack, *frame]. What happens by chance follows from `seed`."""

    @abc.abstractmethod
    def step(self, actions: Array) -> Seen:
        """Do one thing in each."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of what they hold."""


def make_games(name: str, count: int, *, lives_count: bool = False, longest: int = 27_000) -> Games:
    """Games by the name that gymnasium has for them.

    Args:
        name: such as "CartPole-v1" or "ALE/Pong-v5"; "module:Name" first imports a module that registers it.
        count: how many.
        lives_count: of Atari's: whether to lose a life is an end, though the game goes on.
        longest: of Atari's: steps after which a game is over.

    Raises:
        DataError: gymnasium is not installed or does not know the name, or it is a game of another sort.
    """
    gymnasium = _gymnasium()
    try:
        if name.startswith(ATARI):
            return _Atari(gymnasium, name, count, lives_count, longest)
        return _Numbers(gymnasium.make_vec(name, num_envs=count, vectorization_mode="sync"), name)
    except (gymnasium.error.Error, ImportError) as error:
        raise DataError(
            f"The game {name!r} cannot be made: {error}. `gymnasium.pprint_registry()` lists the names."
        ) from error


class _Numbers(Games):
    """An observation is one row of numbers."""

    def __init__(self, games: Any, name: str) -> None:
        seen, done = games.single_observation_space, games.single_action_space
        if len(getattr(seen, "shape", None) or ()) != 1 or not hasattr(done, "n") or done.start:
            games.close()
            raise DataError(
                f"The game {name!r} shows {seen} and takes {done}, but it must show a row of numbers and take one of "
                "some actions. Take another, such as CartPole-v1, or one of Atari's, such as ALE/Pong-v5."
            )
        self.kind = Kind(tuple(seen.shape), "float32", 1, int(done.n))
        self._games = games
        self._over = np.zeros(games.num_envs, bool)

    def reset(self, seed: int) -> Array:
        observations, _ = self._games.reset(seed=seed)
        self._over[:] = False
        return np.asarray(observations, np.float32)[:, None]

    def step(self, actions: Array) -> Seen:
        observations, rewards, ended, cut_short, _ = self._games.step(actions)
        fresh, self._over = self._over, ended | cut_short
        return Seen(np.asarray(observations, np.float32)[:, None], np.asarray(rewards, np.float64), ended, fresh)

    def close(self) -> None:
        self._games.close()


class _Atari(Games):
    """An observation is four pictures."""

    def __init__(self, gymnasium: Any, name: str, count: int, lives_count: bool, longest: int) -> None:
        module = _ale()
        kwargs = dict(gymnasium.spec(name).kwargs)
        if kwargs.get("obs_type", "rgb") == "ram":
            raise DataError(f"The game {name!r} shows the console's memory: take the one that shows pictures.")
        self._games = module.AtariVectorEnv(
            kwargs["game"],
            count,
            num_threads=1,
            repeat_action_probability=STICKY,
            frameskip=FRAMES_PER_STEP,
            max_num_frames_per_episode=FRAMES_PER_STEP * longest,
            reward_clipping=False,
            life_loss_info=lives_count,
        )
        space = self._games.single_observation_space
        self.kind = Kind(tuple(space.shape[1:]), "uint8", space.shape[0], int(self._games.single_action_space.n))
        self._frame_number = np.zeros(count, np.int64)

    def reset(self, seed: int) -> Array:
        observations, info = self._games.reset(seed=seed % 2**31)
        self._frame_number = info["episode_frame_number"].astype(np.int64)
        return np.asarray(observations)

    def step(self, actions: Array) -> Seen:
        observations, rewards, ended, _, info = self._games.step(np.asarray(actions, np.int64))
        before, self._frame_number = self._frame_number, info["episode_frame_number"].astype(np.int64)
        fresh = self._frame_number < before  # it counts from 0 in every game
        return Seen(np.asarray(observations), np.asarray(rewards, np.float64), np.asarray(ended) & ~fresh, fresh)

    def close(self) -> None:
        self._games.close()


def play_games(
    games: Games,
    count: int,
    each: int,
    act: Callable[[Array], Array],
    *,
    epsilon: float,
    seed: int,
    see: Callable[[Array], None] = lambda _: None,
) -> list[float]:
    """Play every one of `count` games side by side `each` times to its end.

    Args:
        act: the best actions [count] by observations [count, stack, *frame].
        epsilon: share of actions taken at random instead.
        seed: of all that happens by chance.
        see: is shown the observations at every step.

    Returns: the scores [count · each].
    """
    random = np.random.default_rng(seed)
    observations, scores = games.reset(seed), np.zeros(count)
    found: list[list[float]] = [[] for _ in range(count)]
    while min(map(len, found)) < each:
        see(observations)
        actions = np.where(
            random.random(count) < epsilon, random.integers(games.kind.actions, size=count), act(observations)
        )
        seen = games.step(actions)
        for game in np.flatnonzero(seen.fresh):
            found[game].append(float(scores[game]))
        scores = np.where(seen.fresh, 0.0, scores + seen.rewards)
        observations = seen.observations
    return [score for game in found for score in game[:each]]


def _gymnasium() -> Any:
    try:
        return importlib.import_module("gymnasium")
    except ImportError as error:
        raise DataError(f"Games need gymnasium ({error}). Install it with: pip install 'millrace[zoo]'") from error


def _ale() -> Any:
    try:
        return importlib.import_module("ale_py.vector_env")
    except ImportError as error:
        raise DataError(f"Atari's games need ale-py ({error}). Install it with: pip install 'millrace[zoo]'") from error
