"""Evaluation by playing: a batch of scores of whole games."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import nn

from millrace.data.batches import Batch, EpochBatches
from millrace.errors import DataError
from millrace.models.games import Games, play_games
from millrace.models.replay import Array

_SIDE_BY_SIDE = 20  # games at a time


class Matches(EpochBatches):
    """One batch, {"scores": [count]}: of games that are played when it is asked for.

    Args:
        name: in messages.
        make: so many games side by side.
        count: how many to play.
        epsilon: share of actions taken at random.
        seed: of all that happens by chance.
    """

    draws_global_random = False

    def __init__(self, name: str, make: Callable[[int], Games], count: int, epsilon: float, seed: int) -> None:
        super().__init__(name, {"seed": seed})
        self._make, self._count, self._epsilon, self._seed = make, count, epsilon, seed
        self._network: nn.Module | None = None

    @property
    def batches_per_epoch(self) -> int | None:
        return 1

    def follow(self, network: nn.Module) -> None:
        """Who plays."""
        self._network = network

    def one_pass(self) -> Iterator[Batch]:
        if self._network is None:
            raise DataError(f"{self.name} needs somebody who plays: call `follow` with a network first.")
        each = -(-self._count // _SIDE_BY_SIDE)
        lanes = -(-self._count // each)
        games = self._make(lanes)
        scores = play_games(games, lanes, each, acting(self._network), epsilon=self._epsilon, seed=self._seed)
        games.close()
        yield {"scores": torch.tensor(scores[: self._count])}

    def _read_epoch(self, epoch: int, first: int) -> Iterator[Batch]:
        return iter([] if first else self.one_pass())


def acting(network: nn.Module) -> Callable[[Array], Array]:
    """The best actions [N] by observations [N, S, …], as a network sees it."""
    device = next(network.parameters()).device

    def act(observations: Array) -> Array:
        with torch.no_grad():
            return cast(Array, network(torch.from_numpy(observations).to(device)).argmax(-1).cpu().numpy())

    return act
