"""One game from its beginning to its end, to be looked at: which one a file asks for, and what was seen."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from millrace.errors import DataError
from millrace.models.games import Games, play_games
from millrace.models.matches import acting
from millrace.models.pictures import contact_sheet, curves

LONGEST_FILM = 1000  # frames


def read_wish(file: Path) -> tuple[str, int]:
    """The name of a game, and the seed of all that happens in it by chance (0 unless the file has a number).

    Raises:
        DataError: the file is missing, or holds something else.
    """
    try:
        name, *rest = file.read_text(encoding="utf-8").split()
        (seed,) = [int(word) for word in rest] or [0]
        return name, seed % 2**31
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file} must name a game and may add a whole number, such as `ALE/Pong-v5 7`: {error}"
        ) from error


def watch(games: Games, network: nn.Module, *, epsilon: float, seed: int) -> tuple[float, dict[str, Tensor]]:
    """Play one game: its score, and what was seen.

    Args:
        games: one, side by side with no other.
        network: observations [1, S, …] to values of actions [1, A].
        epsilon: share of actions taken at random.
        seed: of all that happens by chance.

    Returns: the score, and pictures from 0 to 1: of a game that shows numbers their curves, "numbers"; of one that
        shows pictures some of them, "game", and up to 1000 of them as a film, "film" [frames, 1, rows, cols].
    """
    seen: list[Tensor] = []
    (score,) = play_games(
        *(games, 1, 1, acting(network)),
        epsilon=epsilon,
        seed=seed,
        see=lambda observations: seen.append(torch.from_numpy(observations[0, -1].copy())),
    )
    frames = torch.stack(seen).float()
    if frames.ndim == 2:
        return score, {"numbers": curves(frames.T)}
    film = frames[:LONGEST_FILM, None] / 255
    return score, {"game": contact_sheet(frames[:, None] / 255, 4, 5), "film": film}
