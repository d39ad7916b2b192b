"""Watching: a game that can be played again as it was, its curves or its film, and files that name no game."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from millrace.errors import DataError
from millrace.models.games import make_games
from millrace.models.watching import read_wish, watch


class Left(nn.Module):
    """Always takes the first action."""

    def __init__(self, actions: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.linspace(1, 0, actions))

    def forward(self, observations: Tensor) -> Tensor:
        return self.values.expand(len(observations), -1)


def watched(name: str, seed: int, longest: int = 27_000) -> tuple[float, dict[str, Tensor]]:
    games = make_games(name, 1, longest=longest)
    found = watch(games, Left(games.kind.actions), epsilon=0.0, seed=seed)
    games.close()
    return found


def test_a_game_of_numbers_is_shown_as_curves_and_follows_from_its_seed() -> None:
    (score, pictures), (again, the_same), (_, other) = (watched("CartPole-v1", seed) for seed in (7, 7, 8))
    assert score == again
    assert 8 <= score <= 11
    curves = pictures["numbers"]
    assert curves.shape == (1, 4 * 68 - 4, score + 1)  # what it shows before the first action, and after each
    assert curves.equal(the_same["numbers"])
    assert not curves.equal(other["numbers"])


def test_a_game_of_pictures_is_shown_as_a_sheet_and_a_film() -> None:
    _, pictures = watched("ALE/Pong-v5", 3, longest=60)
    assert set(pictures) == {"game", "film"}
    assert pictures["film"].shape[1:] == (1, 84, 84)
    assert len(pictures["film"]) > 10
    for picture in pictures.values():
        assert 0 <= float(picture.min()) < float(picture.max()) <= 1


@pytest.mark.parametrize(
    ("words", "wish"), [("CartPole-v1\n", ("CartPole-v1", 0)), ("ALE/Pong-v5 7", ("ALE/Pong-v5", 7))]
)
def test_a_file_names_a_game_and_a_seed(words: str, wish: tuple[str, int], tmp_path: Path) -> None:
    (tmp_path / "game.txt").write_text(words)
    assert read_wish(tmp_path / "game.txt") == wish


@pytest.mark.parametrize("words", [None, "", "CartPole-v1 seven", "CartPole-v1 1 2"])
def test_a_file_that_names_no_game_is_refused(words: str | None, tmp_path: Path) -> None:
    if words is not None:
        (tmp_path / "game.txt").write_text(words)
    with pytest.raises(DataError, match="must name a game"):
        read_wish(tmp_path / "game.txt")
