"""The data factory: a few clean recordings become many noisy ones, on the fly, each the same whenever it is asked for.

    factory = Factory(clean, rate_hz=8000, recipe=Recipe(copies=10), seed=0)
    len(factory)          # ten times as many as the clean ones
    factory[73]           # the third version of clean recording 7: made now, and the same at any time, anywhere

An example depends on the clean recordings, the recipe, the seed and its own index, and on nothing else. So there is no
random state to be saved: a stream of batches that knows its place (see `batches.py`) goes on bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from millrace.data.noise import NOISES, at_decibels, at_speed, in_room, loudness, room
from millrace.data.randomness import generator_from
from millrace.errors import DataError, did_you_mean


@dataclass(frozen=True)
class Recipe:
    """What the factory does to a clean recording; of every pair the number drawn lies evenly between the two."""

    copies: int = 10  # versions of every clean recording
    noises: tuple[str, ...] = ("car", "crowd", "restaurant")  # one of them in each noisy version
    clean_share: float = 0.1  # of the versions: without noise
    decibels: tuple[float, float] = (-2.0, 25.0)  # speech over noise
    room_share: float = 0.5  # of the versions: said in a room
    reverberation_s: tuple[float, float] = (0.1, 0.5)
    speed: tuple[float, float] = (0.9, 1.1)
    volume_decibels: tuple[float, float] = (-15.0, 5.0)

    def __post_init__(self) -> None:
        unknown = [name for name in self.noises if name not in NOISES]
        if unknown:
            raise DataError(f"There is no noise {unknown[0]!r}. {did_you_mean(unknown[0], list(NOISES))}")
        pairs = (self.decibels, self.reverberation_s, self.speed, self.volume_decibels)
        in_order = all(low <= high for low, high in pairs) and min(*self.reverberation_s, *self.speed) > 0
        if self.copies < 1 or not self.noises or not in_order:
            raise DataError(
                "A recipe needs at least one copy and one noise, and pairs (low, high) in this order, those of speed "
                f"and reverberation above 0; but it is {self}."
            )


class Factory(Sequence[Tensor]):
    """Noisy versions of clean recordings; number i is a version of clean recording `i // copies`."""

    def __init__(self, clean: Sequence[Tensor], rate_hz: int, recipe: Recipe = Recipe(), seed: int = 0) -> None:
        """Raises DataError where there is no clean recording. `clean`: each [n], float or whole numbers."""
        if not len(clean):
            raise DataError("The factory was given no clean recordings. Give it one at least.")
        self._clean, self._rate_hz, self._recipe, self._seed = clean, rate_hz, recipe, seed

    def __len__(self) -> int:
        return len(self._clean) * self._recipe.copies

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        """float32 [n], n depending on the speed."""
        if not 0 <= index < len(self):
            raise IndexError(f"The factory makes examples 0 to {len(self) - 1}, but was asked for {index}.")
        recipe, generator = self._recipe, generator_from("factory", self._seed, index)
        speed, decibels, reverberation_s, volume = (
            low + (high - low) * draw
            for (low, high), draw in zip(
                (recipe.speed, recipe.decibels, recipe.reverberation_s, recipe.volume_decibels),
                torch.rand(4, generator=generator, dtype=torch.float64).tolist(),
                strict=True,
            )
        )
        roomy, clean, kind = torch.rand(3, generator=generator).tolist()
        speech = at_speed(self._clean[index // recipe.copies].float(), speed)
        if roomy < recipe.room_share:
            speech = in_room(speech, room(self._rate_hz, reverberation_s, generator))
        if clean >= recipe.clean_share:
            name = recipe.noises[min(int(kind * len(recipe.noises)), len(recipe.noises) - 1)]
            speech = noisy(speech, name, decibels, self._rate_hz, generator, self._clean)
        return speech * (10 ** (volume / 20) * _USUAL_LOUDNESS / loudness(speech))


def noisy(
    speech: Tensor, name: str, decibels: float, rate_hz: int, generator: torch.Generator, others: Sequence[Tensor]
) -> Tensor:
    """Speech with a noise of that name so many decibels below it (math.inf: with none), [n].

    Args:
        speech: [n].
        name: of `NOISES`.
        decibels: how much louder the speech is.
        rate_hz: samples per second.
        generator: of the noise.
        others: utterances that a crowd may say.
    """
    if decibels == math.inf:
        return speech
    return at_decibels(speech, NOISES[name](len(speech), rate_hz, generator, others), decibels)


_USUAL_LOUDNESS = 0.1  # of full scale: what a volume of 0 dB is
