"""Replay memory: what was seen, done and gained in games, kept to be learned from more than once.

Several games go on side by side, a *lane* each, and every step of all lanes is one *row*:

    frames   what was seen            ages     steps since the game began, up to 255; 0 for its first frame
    actions  what was done then       rewards  what that gained             ends   whether it lost the game, or a life

An observation is the newest `stack` frames of one game; frames before its beginning are zeros. A frame is kept once.
A transition is an observation, what was done, the rewards of up to `ahead` steps from there, and the observation then
(R. Sutton, "Learning to predict by the methods of temporal differences", 1988; with one step, Mnih et al.'s).

Uniform: V. Mnih et al., "Human-level control through deep reinforcement learning", 2015. Prioritized: T. Schaul et
al., "Prioritized experience replay", 2016 (proportional variant).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from millrace.errors import SettingError

Array: TypeAlias = npt.NDArray[Any]
Indices: TypeAlias = npt.NDArray[np.int64]

_ALIGN_BYTES = 64
OLDEST = 255  # ages are counted up to here


@dataclass(frozen=True)
class RowsShape:
    """How many rows there are, and of what."""

    lanes: int
    rows: int  # per lane; the newest overwrite the oldest
    frame: tuple[int, ...]
    dtype: str  # of frames, as numpy calls it

    def parts(self) -> Iterator[tuple[str, tuple[int, ...], np.dtype[Any]]]:
        """Name, shape and dtype of every array."""
        plane = (self.lanes, self.rows)
        yield "frames", (*plane, *self.frame), np.dtype(self.dtype)
        for name, kind in (("ages", "uint8"), ("actions", "int32"), ("rewards", "float32"), ("ends", "bool")):
            yield name, plane, np.dtype(kind)

    @property
    def size_bytes(self) -> int:
        """Of the memory that `Rows` lays its arrays over."""
        return sum(_aligned(math.prod(shape) * kind.itemsize) for _, shape, kind in self.parts())


class Rows:
    """The arrays, [lanes, rows, …], over memory that processes may share."""

    frames: Array
    ages: Array
    actions: Array
    rewards: Array
    ends: Array

    def __init__(self, shape: RowsShape, memory: Any = None, offset: int = 0) -> None:
        """memory: a buffer of `shape.size_bytes` from `offset` on; None for some of its own."""
        self.shape = shape
        buffer = bytearray(shape.size_bytes) if memory is None else memory
        for name, dimensions, kind in shape.parts():
            count = math.prod(dimensions)
            setattr(self, name, np.frombuffer(buffer, kind, count, offset).reshape(dimensions))
            offset += _aligned(count * kind.itemsize)


@dataclass(frozen=True)
class Sample:
    """Transitions from a memory. B transitions, S frames in an observation."""

    observations: Array  # [B, S, *frame]
    actions: Indices  # [B]
    rewards: npt.NDArray[np.float32]  # [B], the sum of those up to `after`, discounted
    after: Array  # [B, S, *frame]
    discounts: npt.NDArray[
        np.float32
    ]  # [B], of what `after` is worth: 0 where the game, or a life, was lost on the way
    weights: npt.NDArray[np.float32]  # [B], against the bias of unequal chances
    places: Indices  # [B], for `prioritize`


class ReplayMemory:
    """Samples from the rows that are complete, while others are written.

    Args:
        rows: where writers write: row n of every lane lies at n modulo `rows.shape.rows`.
        stack: frames in an observation.
        written: how many rows writers may be at beyond those that `grow` was told of: as many of the oldest are left
            out.
        ahead: steps from an observation to the one after, at most: fewer where the game ends, or the memory.
        discount: of a reward for every step that it lies ahead.
        alpha: 0 takes all alike, 1 in proportion to their priority. Priorities cost time, so 0 keeps none.
    """

    def __init__(
        self, rows: Rows, stack: int, written: int, *, ahead: int = 1, discount: float = 1.0, alpha: float = 0.0
    ) -> None:
        if rows.shape.rows < written + stack + 2:
            raise SettingError(
                f"A replay memory of {rows.shape.rows} rows in each of {rows.shape.lanes} games is too small: with "
                f"{written} rows being written it needs {written + stack + 2}. Let it hold more transitions."
            )
        self.rows = rows
        self.complete = 0  # rows of every lane
        self._stack = stack
        self._written = written
        self._ahead, self._discount = ahead, discount
        self._alpha = alpha
        self._sums = SumTree(rows.shape.lanes * rows.shape.rows) if alpha else None
        self._highest = 1.0  # priority so far, which new transitions get: each is to be learned from once

    def grow(self, count: int) -> None:
        """`count` more rows are complete."""
        before, self.complete = self.complete, self.complete + count
        if self._sums is None:
            return
        new = np.arange(max(0, before - 1), self.complete - 1)
        self._sums.set(self._places(new), np.where(self._whole(new), self._highest, 0.0).ravel())
        first = max(0, self._first())
        stale = np.arange(max(0, first - count - self._stack), first)
        self._sums.set(self._places(stale), np.zeros(stale.size * self.rows.shape.lanes))

    def clear(self) -> None:
        """Forget everything; row 0 is written next."""
        self.complete, self._highest = 0, 1.0
        if self._sums is not None:
            self._sums = SumTree(self._sums.size)

    def __len__(self) -> int:
        """How many places for transitions are in use (those at a game's end hold none)."""
        return max(0, self.complete - 1 - self._first()) * self.rows.shape.lanes

    def sample(self, count: int, random: np.random.Generator, beta: float = 1.0) -> Sample:
        """`count` transitions, each drawn from all.

        Args:
            random: decides which.
            beta: how far weights make up for unequal chances (Schaul et al., section 3.4): 0 not at all, 1 wholly.
        """
        if not len(self):
            raise SettingError(
                f"There is nothing to sample: only {self.complete} rows of the memory are complete. Play more first."
            )
        weights = np.ones(count, np.float32)
        if self._sums is None:
            lanes, rows = self._uniform(count, random)
        else:
            places = self._sums.find((random.random(count) + np.arange(count)) / count * self._sums.total)
            lanes, slots = np.divmod(places, self.rows.shape.rows)
            rows = self.complete - 1 - (self.complete - 1 - slots) % self.rows.shape.rows
            chances = self._sums.values(places) / self._sums.total
            unscaled = (len(self) * chances) ** -beta
            weights = (unscaled / unscaled.max()).astype(np.float32)
        return self._read(lanes, rows, weights)

    def prioritize(self, places: Indices, errors: Array) -> None:
        """Give transitions that were sampled a priority by their errors (of which only the size counts)."""
        if self._sums is None:
            return
        priorities = (np.abs(errors).astype(np.float64) + 1e-2) ** self._alpha
        alive = self._sums.values(places) > 0  # others have been written over meanwhile
        self._sums.set(places[alive], priorities[alive])
        self._highest = max(self._highest, float(priorities.max(initial=0.0)))

    def _first(self) -> int:
        """The oldest row whose observation will be there while writers are ahead."""
        oldest = self.complete + self._written - self.rows.shape.rows
        return 0 if oldest <= 0 else oldest + self._stack - 1

    def _uniform(self, count: int, random: np.random.Generator) -> tuple[Indices, Indices]:
        lanes, rows = np.empty(0, np.int64), np.empty(0, np.int64)
        while len(lanes) < count:
            lane = random.integers(self.rows.shape.lanes, size=count)
            row = random.integers(self._first(), self.complete - 1, size=count)
            whole = self.rows.ages[lane, (row + 1) % self.rows.shape.rows] > 0
            lanes, rows = np.concatenate([lanes, lane[whole]]), np.concatenate([rows, row[whole]])
        return lanes[:count], rows[:count]

    def _whole(self, rows: Indices) -> Array:
        """Of every lane and these rows, [lanes, n]: whether the next row belongs to the same game."""
        return self.rows.ages[:, (rows + 1) % self.rows.shape.rows] > 0

    def _places(self, rows: Indices) -> Indices:
        lanes = np.arange(self.rows.shape.lanes)[:, None] * self.rows.shape.rows
        return (lanes + rows % self.rows.shape.rows).ravel()

    def _read(self, lanes: Indices, rows: Indices, weights: npt.NDArray[np.float32]) -> Sample:
        slots = rows % self.rows.shape.rows
        after, rewards, discounts = self._ahead_of(lanes, rows)
        return Sample(
            self._observations(lanes, rows),
            self.rows.actions[lanes, slots].astype(np.int64),
            rewards.astype(np.float32),
            self._observations(lanes, after),
            discounts.astype(np.float32),
            weights,
            lanes * self.rows.shape.rows + slots,
        )

    def _ahead_of(self, lanes: Indices, rows: Indices) -> tuple[Indices, Array, Array]:
        """Up to `ahead` steps on: the rows there, the rewards up to there, and what counts of all that follows."""
        kept, size = self.rows, self.rows.shape.rows
        after, rewards, discounts = rows.copy(), np.zeros(len(rows)), np.ones(len(rows))
        goes_on = np.ones(len(rows), bool)
        for _ in range(self._ahead):
            slots = after % size
            goes_on &= (after + 1 < self.complete) & (kept.ages[lanes, (after + 1) % size] > 0)
            rewards += np.where(goes_on, discounts * kept.rewards[lanes, slots], 0.0)
            lost = goes_on & kept.ends[lanes, slots]
            discounts = np.where(lost, 0.0, np.where(goes_on, discounts * self._discount, discounts))
            after += goes_on
            goes_on &= ~lost
        return after, rewards, discounts

    def _observations(self, lanes: Indices, rows: Indices) -> Array:
        kept = self.rows
        back = np.arange(self._stack - 1, -1, -1)
        frames = kept.frames[lanes[:, None], (rows[:, None] - back) % kept.shape.rows]
        before = back[None] > kept.ages[lanes, rows % kept.shape.rows][:, None]  # of another game
        if before.any():
            frames[before] = 0
        return frames


class SumTree:
    """Numbers from 0 on, of which one can be drawn in proportion to its size, in logarithmic time."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._leaves = 1 << max(0, size - 1).bit_length()
        self._nodes = np.zeros(2 * self._leaves)  # node n is the sum of nodes 2n and 2n + 1

    @property
    def total(self) -> float:
        """The sum of all."""
        return float(self._nodes[1])

    def values(self, places: Indices) -> npt.NDArray[np.float64]:
        """The numbers at some places."""
        return self._nodes[self._leaves + places]

    def set(self, places: Indices, values: npt.NDArray[np.float64]) -> None:
        """Change numbers; of two for one place the later counts."""
        nodes = self._leaves + places
        self._nodes[nodes] = values
        while len(nodes) and nodes[0] > 1:
            nodes = np.unique(nodes // 2)
            self._nodes[nodes] = self._nodes[2 * nodes] + self._nodes[2 * nodes + 1]

    def find(self, targets: npt.NDArray[np.float64]) -> Indices:
        """Where the running sum first exceeds each of `targets`, which lie in [0, total)."""
        nodes, left = np.ones(len(targets), np.int64), targets.copy()
        while nodes[0] < self._leaves:
            nodes = 2 * nodes
            below = self._nodes[nodes]
            # A rounding error must not lead to numbers that are 0.
            right = (left >= below) & (self._nodes[nodes + 1] > 0)
            left -= np.where(right, below, 0.0)
            nodes += right
        return nodes - self._leaves


def _aligned(count_bytes: int) -> int:
    return -(-count_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
