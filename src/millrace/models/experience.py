"""Batches from a replay memory that actors fill while they are learned from."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from millrace.data.batches import Batch, EpochBatches
from millrace.data.randomness import derived_seed, global_random_kept
from millrace.graph.graph import Graph
from millrace.graph.training import evaluation_graph
from millrace.models.actors import Actors, Playing, Round
from millrace.models.games import Kind
from millrace.models.replay import ReplayMemory, RowsShape

_LATEST = 100  # games whose mean score is told


@dataclass(frozen=True)
class Pace:
    """How much is played, and when."""

    capacity: int  # transitions in the memory
    warm_up: int  # transitions before learning begins
    every: int  # transitions for each step of learning
    epsilon: Callable[[int], float]  # share of random actions, by steps of learning
    rows: int  # of every lane in a round
    ahead: int = 1  # steps from an observation to the one after it
    discount: float = 0.99  # of a reward for each of them


@dataclass(frozen=True)
class Priorities:
    """Schaul et al. 2016. alpha: 0 takes all transitions alike."""

    alpha: float
    beta: Callable[[int], float]  # by steps of learning


class Experience(EpochBatches):
    """An endless stream of samples. Its position is a number of steps: what is in the memory does not outlive a run.

    A batch is a dict of what `Sample` says, "observations", "actions", "rewards", "after", "discounts" and "weights",
    and of "scores" [B], all the same: the mean of the latest games.

    Args:
        playing: how actors play.
        kind: of the game.
        pace: how much, and when.
        priorities: by which to sample.
        batch_size: B.
        network: makes one that takes observations [N, stack, *frame] and gives values of actions [N, actions].
    """

    draws_global_random = False

    def __init__(
        self,
        playing: Playing,
        kind: Kind,
        pace: Pace,
        priorities: Priorities,
        batch_size: int,
        network: Callable[[], nn.Module],
    ) -> None:
        super().__init__(playing.game, {"seed": playing.seed})
        self._playing, self._kind, self._pace, self._priorities = playing, kind, pace, priorities
        self._batch_size, self._make_network = batch_size, network
        self._lanes = playing.actors * playing.games
        rows = max(pace.capacity // self._lanes, 2 * pace.rows + kind.stack + 2)
        self._shape = RowsShape(self._lanes, rows, kind.frame, kind.dtype)
        self._weights: dict[str, Tensor] = {}
        self._actors: Actors | None = None
        self._memory: ReplayMemory | None = None
        self._anew = False  # whether games are to begin anew with the next round
        self._scores: deque[float] = deque(maxlen=_LATEST)
        self._score = 0.0
        self._places = np.empty(0, np.int64)  # of the last sample

    @property
    def batches_per_epoch(self) -> int | None:
        """None: there is no end."""
        return None

    @property
    def steps_per_round(self) -> int:
        """How many steps are learned with the actors' weights as they are."""
        return max(1, self._pace.rows * self._lanes // self._pace.every)

    @property
    def actor_pids(self) -> list[int]:
        """The processes that play."""
        return self._actors.pids if self._actors is not None else []

    def follow(self, network: nn.Module, *, forget: bool = False) -> None:
        """Act by the present weights of a network from the next round on; before this, all actions are random.

        Args:
            network: as the factory makes them, on any device.
            forget: what was played before.
        """
        self._weights = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        if forget and self._memory is not None:
            self._finish_round()
            self._memory.clear()
            self._anew = True

    def prioritize(self, errors: Tensor) -> None:
        """Tell of the errors [B] of the batch handed out last."""
        if self._memory is not None:
            self._memory.prioritize(self._places, errors.detach().cpu().numpy())

    def one_pass(self) -> Iterator[Batch]:
        """One batch of what is in the memory."""
        yield self._sample(self._filled(self.handed_out), self.handed_out)

    def close(self) -> None:
        """End the actors, and forget what they played."""
        super().close()
        actors, self._actors, self._memory = self._actors, None, None
        if actors is not None:
            actors.close()

    def _read_epoch(self, epoch: int, first: int) -> Iterator[Batch]:
        number = first
        while True:
            memory = self._filled(number)
            assert self._actors is not None
            if number % self.steps_per_round == 0 or not self._actors.busy:
                self._finish_round()
                self._ask(number)
            yield self._sample(memory, number)
            number += 1

    def _filled(self, number: int) -> ReplayMemory:
        """The memory, after a warm-up where nothing is in it."""
        if self._memory is None:
            self._actors = Actors(self._playing, self._shape, self._policy())
            self._memory = ReplayMemory(
                self._actors.rows,
                self._kind.stack,
                self._pace.rows,
                ahead=self._pace.ahead,
                discount=self._pace.discount,
                alpha=self._priorities.alpha,
            )
        most = (self._shape.rows - self._pace.rows - self._kind.stack - 1) * self._lanes
        if not len(self._memory):
            while len(self._memory) < min(self._pace.warm_up, most):
                self._ask(number)
                self._finish_round()
        return self._memory

    def _policy(self) -> Graph:
        """What every actor does with the observations of its lanes."""
        dtype = getattr(torch, self._kind.dtype)
        example = torch.zeros((self._playing.games, self._kind.stack, *self._kind.frame), dtype=dtype)
        with global_random_kept():
            return evaluation_graph(self._make_network(), _best_actions, example)

    def _ask(self, number: int) -> None:
        assert self._actors is not None
        assert self._memory is not None
        epsilon = 1.0
        if self._weights:
            self._actors.publish(self._weights)
            epsilon = self._pace.epsilon(number)
        self._actors.ask(Round(self._memory.complete, self._pace.rows, epsilon, self._anew))
        self._anew = False

    def _finish_round(self) -> None:
        assert self._actors is not None
        assert self._memory is not None
        if self._actors.busy:
            finished, running = self._actors.wait()
            self._memory.grow(self._pace.rows)
            self._scores.extend(finished)
            self._score = statistics.fmean(self._scores or running)

    def _sample(self, memory: ReplayMemory, number: int) -> Batch:
        random = np.random.default_rng(derived_seed("sample", self._playing.seed, number))
        found = memory.sample(self._batch_size, random, self._priorities.beta(number))
        self._places = found.places
        return {
            "observations": torch.from_numpy(found.observations),
            "actions": torch.from_numpy(found.actions),
            "rewards": torch.from_numpy(found.rewards),
            "after": torch.from_numpy(found.after),
            "discounts": torch.from_numpy(found.discounts),
            "weights": torch.from_numpy(found.weights),
            "scores": torch.full((self._batch_size,), self._score),
        }


def _best_actions(network: nn.Module, observations: Tensor) -> dict[str, Tensor]:
    return {"actions": network(observations).argmax(-1)}
