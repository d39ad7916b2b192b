"""Games side by side: what a step tells, Atari's preparation, whole games, names that are no good."""

from __future__ import annotations

import json

import numpy as np
import pytest

from millrace.errors import DataError
from millrace.models.actor import Player
from millrace.models.games import Kind, make_games, play_games
from millrace.models.replay import ReplayMemory, Rows, RowsShape


def test_a_game_that_is_over_begins_anew_with_the_next_step() -> None:
    games = make_games("CartPole-v1", 3)
    games.reset(0)
    random = np.random.default_rng(0)
    over = np.zeros(3, bool)
    ended = 0
    for _ in range(200):
        seen = games.step(random.integers(2, size=3))
        assert seen.fresh.tolist() == over.tolist()
        assert (seen.rewards == np.where(seen.fresh, 0, 1)).all()
        assert (np.abs(seen.observations[seen.fresh]) <= 0.05).all()  # where CartPole begins
        over = seen.ends
        ended += int(over.sum())
    games.close()
    assert ended > 10


def test_a_game_that_is_cut_short_has_no_end() -> None:
    games = make_games("MountainCar-v0", 1)  # is cut short after 200 steps
    games.reset(0)
    seen = [games.step(np.zeros(1, np.int64)) for _ in range(202)]
    games.close()
    assert not any(step.ends[0] for step in seen)
    assert [number for number, step in enumerate(seen) if step.fresh[0]] == [200]


@pytest.mark.parametrize("kind", [Kind((4,), "float32", 1, 2), Kind((84, 84), "uint8", 4, 6)])
def test_a_kind_survives_json(kind: Kind) -> None:
    assert Kind.from_json(json.loads(json.dumps(kind.to_json()))) == kind


def test_what_happens_follows_from_the_seed() -> None:
    runs = []
    for seed in (3, 3, 4):
        games = make_games("ALE/Pong-v5", 2)
        first = games.reset(seed)
        steps = [games.step(np.full(2, number % 6)).observations.copy() for number in range(40)]
        games.close()
        runs.append(np.stack([first, *steps]))
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_ataris_observations_are_four_frames_and_lives_are_ends_where_wanted() -> None:
    for lives_count in (False, True):
        games = make_games("ALE/Breakout-v5", 2, lives_count=lives_count)
        assert games.kind == Kind((84, 84), "uint8", 4, 4)
        before = games.reset(0)
        ends = fresh = 0
        random = np.random.default_rng(0)
        while fresh < 2:
            seen = games.step(random.integers(4, size=2))
            same = ~seen.fresh
            assert np.array_equal(seen.observations[same, :3], before[same, 1:])
            assert not seen.observations[seen.fresh, :3].any()
            before = seen.observations.copy()
            ends, fresh = ends + int(seen.ends.sum()), fresh + int(seen.fresh.sum())
        games.close()
        assert ends >= 10 if lives_count else ends == fresh  # five lives each


def test_a_player_keeps_every_frame_once_and_observations_come_back_as_they_were() -> None:
    games = make_games("ALE/Breakout-v5", 2, lives_count=True)
    rows = Rows(RowsShape(2, 260, games.kind.frame, "uint8"))
    player = Player(games, rows, first_lane=0, count=2, clipped=True, seed=1)
    observed = []

    def act(observations: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        observed.append(observations.copy())
        return np.full(2, 1 + len(observed) % 3)

    finished = player.play(0, 250, 0.0, act)
    games.close()
    memory = ReplayMemory(rows, stack=4, written=0)
    memory.grow(250)
    found = memory.sample(300, np.random.default_rng(0))
    lanes, slots = np.divmod(found.places, 260)
    for before, after, lane, slot in zip(found.observations, found.after, lanes, slots, strict=True):
        assert np.array_equal(before, observed[slot][lane])
        if slot + 1 < len(observed):
            assert np.array_equal(after, observed[slot + 1][lane])
    assert set(np.unique(rows.rewards[:, :250])) == {0.0, 1.0}
    assert len(finished) == int((rows.ages[:, 1:250] == 0).sum()) > 0


def test_whole_games_are_played_each_as_often() -> None:
    games = make_games("CartPole-v1", 4)
    lengths: list[int] = []
    scores = play_games(
        games,
        4,
        3,
        lambda observations: lengths.append(1) or np.zeros(4, np.int64),  # type: ignore[func-returns-value]
        epsilon=0.0,
        seed=0,
    )
    games.close()
    assert len(scores) == 12
    assert all(8 <= score <= 11 for score in scores)  # whoever only pushes to the left falls soon
    assert len(lengths) >= 3 * 9


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("CartPoll-v1", "Did you mean: `CartPole`"),
        ("ALE/Pung-v5", "Did you mean: `Pong`"),
        ("Pendulum-v1", "take one of some actions"),
        ("FrozenLake-v1", "must show a row of numbers"),
        ("no_such_module:Game-v0", "no_such_module"),
    ],
)
def test_a_game_that_cannot_be_played_is_named(name: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        make_games(name, 1)
