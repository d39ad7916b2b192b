"""Replay memory: what comes out is what was played, whatever is written meanwhile; chances follow priorities."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.errors import SettingError
from millrace.models.replay import ReplayMemory, Rows, RowsShape, SumTree


class Scribe:
    """Writes rows whose frames tell lane, game and step, for games of given lengths."""

    def __init__(self, lanes: int, rows: int, lengths: list[int]) -> None:
        self.rows = Rows(RowsShape(lanes, rows, (3,), "float32"))
        self._lengths = lengths
        self._row = 0
        self._at = [(0, 0)] * lanes  # game, step

    def length(self, lane: int, game: int) -> int:
        return self._lengths[(game + lane) % len(self._lengths)]

    def write(self, count: int) -> None:
        for _ in range(count):
            slot = self._row % self.rows.shape.rows
            for lane, (game, step) in enumerate(self._at):
                length = self.length(lane, game)
                last = step == length - 1
                self.rows.frames[lane, slot] = (lane + 1, game + 1, step + 1)
                self.rows.ages[lane, slot] = min(step, 255)
                self.rows.actions[lane, slot] = step
                self.rows.rewards[lane, slot] = 10 * game + step
                # A game of n steps shows n + 1 frames: after the last, nothing is played.
                self.rows.ends[lane, slot] = last
                self._at[lane] = (game + 1, 0) if step == length else (game, step + 1)
            self._row += 1


def check(
    memory: ReplayMemory, scribe: Scribe, stack: int, count: int, seed: int, ahead: int = 1
) -> set[tuple[int, int, int]]:
    """That what is sampled is what was played; returns lane, game and step of all."""
    found = memory.sample(count, np.random.default_rng(seed))
    seen = set()
    for n in range(count):
        lane, game, step = (int(number) - 1 for number in found.observations[n, -1])
        after_lane, after_game, after = (int(number) - 1 for number in found.after[n, -1])
        length = scribe.length(lane, game)
        assert (after_lane, after_game) == (lane, game)
        assert step < after <= min(step + ahead, length)
        assert found.actions[n] == step
        assert found.rewards[n] == sum((10 * game + s) * 0.5 ** (s - step) for s in range(step, after))
        assert found.discounts[n] == (0.0 if after == length else 0.5 ** (after - step))
        for frames, at in ((found.observations[n], step), (found.after[n], after)):
            for back in range(stack):
                wanted = (lane + 1, game + 1, at - back + 1) if at >= back else (0, 0, 0)
                assert tuple(frames[stack - 1 - back]) == wanted
        seen.add((lane, game, step))
    return seen


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 5),
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.7]),
    st.integers(0, 9),
    st.integers(1, 4),
)
def test_a_sample_is_what_was_played_while_writers_are_ahead(
    lanes: int, stack: int, written: int, lengths: list[int], rounds: int, alpha: float, spare: int, ahead: int
) -> None:
    scribe = Scribe(lanes, written + stack + 8 + spare, lengths)
    memory = ReplayMemory(scribe.rows, stack, written, ahead=ahead, discount=0.5, alpha=alpha)
    scribe.write(8)
    memory.grow(8)
    for number in range(rounds):
        scribe.write(written)  # played while what follows is learned
        check(memory, scribe, stack, 24, number, ahead)
        memory.prioritize(memory.sample(4, np.random.default_rng(number)).places, np.arange(4.0))
        memory.grow(written)


def test_every_transition_comes_and_no_other() -> None:
    scribe = Scribe(2, 40, [4])
    memory = ReplayMemory(scribe.rows, 2, 5, discount=0.5)
    scribe.write(21)
    memory.grow(21)
    seen = check(memory, scribe, 2, 2000, 0)
    assert seen == {(lane, game, step) for lane in range(2) for game in range(4) for step in range(4)}


def test_rewards_of_several_steps_are_summed_up_to_the_end_of_a_game() -> None:
    scribe = Scribe(1, 40, [4])
    memory = ReplayMemory(scribe.rows, 1, 2, ahead=3, discount=0.5)
    scribe.write(12)
    memory.grow(12)
    assert len(check(memory, scribe, 1, 500, 0, ahead=3)) == 4 + 4 + 1
    found = memory.sample(500, np.random.default_rng(0))
    first = (found.observations[:, -1] == (1, 2, 1)).all(1)
    assert first.any()
    assert (found.after[first, -1, 2] == 4).all()  # three steps on
    assert found.rewards[first] == pytest.approx(10 + 11 / 2 + 12 / 4)


def test_the_oldest_rows_make_room() -> None:
    scribe = Scribe(1, 20, [1000])
    memory = ReplayMemory(scribe.rows, 3, 4, discount=0.5)
    for _ in range(15):
        scribe.write(4)
        memory.grow(4)
    assert {step for _, _, step in check(memory, scribe, 3, 500, 0)} == set(range(46, 59))
    assert len(memory) == 13


def test_chances_follow_priorities_and_weights_make_up_for_them() -> None:
    scribe = Scribe(1, 30, [1000])
    memory = ReplayMemory(scribe.rows, 1, 4, discount=0.5, alpha=1.0)
    scribe.write(5)
    memory.grow(5)
    memory.prioritize(np.arange(4), np.array([0.99, -1.99, 2.99, 3.99]))
    found = memory.sample(10_000, np.random.default_rng(0), beta=1.0)
    assert np.bincount(found.actions, minlength=4) == pytest.approx(np.array([1000, 2000, 3000, 4000]), abs=2)
    for action, weight in enumerate([1.0, 1 / 2, 1 / 3, 1 / 4]):
        assert found.weights[found.actions == action] == pytest.approx(weight, rel=1e-4)
    assert memory.sample(50, np.random.default_rng(0), beta=0.0).weights == pytest.approx(1.0)


def test_new_transitions_have_the_highest_priority() -> None:
    scribe = Scribe(1, 30, [1000])
    memory = ReplayMemory(scribe.rows, 1, 4, discount=0.5, alpha=1.0)
    scribe.write(3)
    memory.grow(3)
    memory.prioritize(np.array([0, 1]), np.array([0.0, 9.99]))
    scribe.write(2)
    memory.grow(2)
    counts = np.bincount(memory.sample(30_000, np.random.default_rng(0)).actions, minlength=4)
    assert counts[1:] == pytest.approx(10_000, abs=100)


def test_priorities_of_what_was_written_over_are_not_taken() -> None:
    scribe = Scribe(1, 16, [1000])
    memory = ReplayMemory(scribe.rows, 1, 4, discount=0.5, alpha=1.0)
    scribe.write(6)
    memory.grow(6)
    old = memory.sample(4, np.random.default_rng(0)).places
    for _ in range(3):
        scribe.write(4)
        memory.grow(4)
    memory.prioritize(old, np.full(4, 1e6))
    scribe.write(4)
    check(memory, scribe, 1, 200, 0)


def test_a_cleared_memory_begins_anew() -> None:
    scribe = Scribe(2, 20, [4])
    for alpha in (0.0, 1.0):
        memory = ReplayMemory(scribe.rows, 2, 5, alpha=alpha)
        memory.grow(10)
        memory.clear()
        assert len(memory) == 0
        with pytest.raises(SettingError, match="Play more first"):
            memory.sample(1, np.random.default_rng(0))


def test_a_memory_that_is_too_small_is_refused() -> None:
    with pytest.raises(SettingError, match="needs 13"):
        ReplayMemory(Rows(RowsShape(1, 12, (), "uint8")), stack=4, written=7)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=40), st.data())
def test_a_sum_tree_finds_what_a_running_sum_does(values: list[float], draw: st.DataObject) -> None:
    tree = SumTree(len(values))
    tree.set(np.arange(len(values)), np.zeros(len(values)) + 7)
    order = np.array(draw.draw(st.permutations(range(len(values)))), dtype=np.int64)
    half = len(values) // 2
    for part in (order[:half], order[half:]):
        tree.set(part, np.array(values)[part])
    assert tree.values(np.arange(len(values))).tolist() == values
    total = sum(values)
    assert tree.total == pytest.approx(total)
    if total > 1e-6:
        targets = np.linspace(0, 1, 50, endpoint=False) * tree.total
        for target, place in zip(targets, tree.find(targets), strict=True):
            assert values[place] > 0
            before = sum(values[:place])
            assert before - 1e-9 * total <= target <= before + values[place] + 1e-9 * total
