"""A process that plays: it acts by the learner's newest weights and writes what happens into the memory they share.

`python -m millrace.models.actor PARENT_PID SOCKET MEMORY`: its end of a socket to the learner, and the descriptor of
memory that holds the rows of a replay memory and, after them, the weights. Both are written only by turns: rows while
the learner has asked to play, weights while it has not.
"""

from __future__ import annotations

import math
import mmap
import os
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from millrace.child_process import end_with
from millrace.data.randomness import derived_seed
from millrace.graph.graph import Graph
from millrace.graph.save import graph_from_bytes
from millrace.models.games import Games, make_games
from millrace.models.replay import OLDEST, Array, Rows, RowsShape
from millrace.runtime.messages import Message, receive, send
from millrace.runtime.session import Session

ACTIONS = "actions"  # what the graph of a policy fetches
_FOREVER_S = 10.0 * 365 * 86400  # the learner may think as long as it likes; when it ends, so does the actor


class Player:
    """Plays some lanes of a replay memory.

    Args:
        games: one for each lane.
        rows: of the whole memory; lanes from `first_lane` on are this player's.
        clipped: whether rewards are kept as -1, 0 or 1 (Mnih et al. 2015), so that one learning rate fits all games.
        seed: of the games' chance and of the player's.
    """

    def __init__(self, games: Games, rows: Rows, first_lane: int, count: int, clipped: bool, seed: int) -> None:
        self._games = games
        self._rows = rows
        self._lanes = slice(first_lane, first_lane + count)
        self._clipped = clipped
        self._seed = seed
        self._count = count
        self._beginnings = 0
        self.restart()

    def restart(self) -> None:
        """Begin all games anew."""
        seed = derived_seed(self._seed, self._beginnings)
        self._beginnings += 1
        self._random = np.random.default_rng(seed)
        self._observations = self._games.reset(seed % 2**31)
        self._ages = np.zeros(self._count, np.int64)
        self.running = np.zeros(self._count)  # scores so far

    def play(self, first: int, count: int, epsilon: float, act: Callable[[Array], Array]) -> list[float]:
        """Write `count` rows from row `first` on. Returns: the scores of the games that came to their end.

        Args:
            epsilon: share of actions taken at random.
            act: the best actions [lanes] by observations [lanes, stack, *frame].
        """
        rows, lanes, finished = self._rows, self._lanes, []
        for row in range(first, first + count):
            slot = row % rows.shape.rows
            rows.frames[lanes, slot] = self._observations[:, -1]
            rows.ages[lanes, slot] = self._ages.clip(max=OLDEST)
            actions = self._random.integers(self._games.kind.actions, size=self._count)
            chosen = self._random.random(self._count) >= epsilon
            if chosen.any():
                actions = np.where(chosen, act(self._observations), actions)
            seen = self._games.step(actions)
            rows.actions[lanes, slot] = actions
            rows.rewards[lanes, slot] = np.sign(seen.rewards) if self._clipped else seen.rewards
            rows.ends[lanes, slot] = seen.ends
            finished += self.running[seen.fresh].tolist()
            self.running = np.where(seen.fresh, 0.0, self.running + seen.rewards)
            self._ages = np.where(seen.fresh, 0, self._ages + 1)
            self._observations = seen.observations
        return finished


class Policy:
    """The learner's network as a graph, on weights that lie in shared memory."""

    def __init__(self, graph: Graph, memory: mmap.mmap, offset: int) -> None:
        self._session = Session(graph, weights_in(graph, memory, offset), compile="eager")

    def __call__(self, observations: Array) -> Array:
        found: Tensor = self._session.run(ACTIONS, torch.from_numpy(np.ascontiguousarray(observations)))
        return np.asarray(found.numpy())


def weights_in(graph: Graph, memory: mmap.mmap, offset: int) -> dict[str, Tensor]:
    """A graph's variables, by name, as they lie in a memory from `offset` on."""
    weights = {}
    for variable in graph.variables:
        spec = variable.spec
        found = torch.frombuffer(memory, dtype=spec.dtype, count=math.prod(spec.shape), offset=offset)
        weights[variable.name] = found.view(spec.shape)
        offset += spec.size_bytes
    return weights


class _Actor:
    """What the learner's messages do."""

    def __init__(self, begin: Message, memory: mmap.mmap) -> None:
        fields = begin.fields
        shape = RowsShape(fields["lanes"], fields["rows"], tuple(fields["frame"]), fields["dtype"])
        games = make_games(
            fields["game"], fields["games"], lives_count=fields["lives_count"], longest=fields["longest"]
        )
        seed = derived_seed("actor", fields["seed"], fields["first_lane"])
        rows = Rows(shape, memory)
        self._player = Player(games, rows, fields["first_lane"], fields["games"], fields["clipped"], seed)
        graph = graph_from_bytes(begin.tensors["policy"].numpy().tobytes())
        self._policy = Policy(graph, memory, shape.size_bytes)

    def play(self, fields: Mapping[str, Any]) -> Message:
        if fields["restart"]:
            self._player.restart()
        finished = self._player.play(fields["first"], fields["count"], fields["epsilon"], self._policy)
        return Message("played", {"finished": finished, "running": self._player.running.tolist()})


def main(arguments: list[str]) -> None:
    """Serve until the learner closes the connection."""
    parent, connection, memory = int(arguments[0]), socket.socket(fileno=int(arguments[1])), int(arguments[2])
    end_with(parent)
    mapped = mmap.mmap(memory, 0)
    os.close(memory)
    actor = _Actor(receive(connection, _FOREVER_S, "the learner"), mapped)
    while True:
        asked = receive(connection, _FOREVER_S, "the learner")
        send(connection, actor.play(asked.fields), _FOREVER_S, "the learner")


if __name__ == "__main__":
    main(sys.argv[1:])
