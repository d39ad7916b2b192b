"""Recordings and what is said in them, as batches of features and letters of one shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from millrace.data.batches import Batch
from millrace.data.factory import noisy
from millrace.data.indexed import IndexedBatches
from millrace.data.randomness import generator_from
from millrace.errors import DataError


class SpeechBatches(IndexedBatches):
    """Batches of recordings; see `speech_batches`."""

    draws_global_random = False

    def __init__(
        self,
        recordings: Sequence[Tensor],
        letters: Sequence[Tensor],
        features: Callable[[Tensor], Tensor],
        frames: int,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
    ) -> None:
        versions, rest = divmod(len(recordings), max(1, len(letters)))
        if not letters or rest:
            raise DataError(
                f"There must be as many recordings as texts, or so many times as many, but there are {len(recordings)} "
                f"recordings and {len(letters)} texts."
            )
        super().__init__("the speech", len(recordings), batch_size, shuffle, seed, drop_last=shuffle)
        self._identity |= {"frames": frames}
        self._recordings, self._letters, self._versions = recordings, letters, versions
        self._features, self._frames = features, frames
        self._most_letters = max(len(text) for text in letters)

    def _fetch(self, indices: Tensor, epoch: int | None, number: int) -> Batch:
        numbers = indices.tolist()
        features = [self._features(self._recordings[i]) for i in numbers]
        letters = [self._letters[i // self._versions] for i in numbers]
        return {
            "features": torch.stack([self._padded(one) for one in features]),
            "frames": torch.tensor([len(one) for one in features]),
            "letters": torch.stack([functional.pad(one, (0, self._most_letters - len(one))) for one in letters]),
            "lengths": torch.tensor([len(one) for one in letters]),
            "version": indices % self._versions,
        }

    def _padded(self, features: Tensor) -> Tensor:
        if len(features) > self._frames:
            raise DataError(
                f"A recording has {len(features)} frames, but there is room for {self._frames}. Leave long recordings "
                "out, cut them into sentences, or make room."
            )
        return functional.pad(features, (0, 0, 0, self._frames - len(features)))


def speech_batches(
    recordings: Sequence[Tensor],
    letters: Sequence[Tensor],
    features: Callable[[Tensor], Tensor],
    frames: int,
    *,
    batch_size: int,
    shuffle: bool = True,
    seed: int = 0,
) -> SpeechBatches:
    """Batches {"features": [B, frames, bands], "frames": [B], "letters": [B, L], "lengths": [B], "version": [B]}.

    All are of one shape, so that one graph serves all; what is beyond an example's own frames and letters is 0.

    Args:
        recordings: k versions of each text, one after the other: number i is of text i // k, version i % k.
        letters: what is said, int64 [l] each.
        features: recording [n] to features [own frames, bands].
        frames: room for so many.
        batch_size: examples per batch, B.
        shuffle: in an order of its own in every epoch; else in order, the last batch short.
        seed: of the order.

    Raises:
        DataError: no text, a number of recordings that is no multiple, fewer than one batch; when read: a recording
            longer than there is room.
    """
    return SpeechBatches(recordings, letters, features, frames, batch_size=batch_size, shuffle=shuffle, seed=seed)


class AtDecibels(Sequence[Tensor]):
    """Every recording over noise of several strengths: number i is recording i // k with `decibels[i % k]`."""

    def __init__(
        self,
        recordings: Sequence[Tensor],
        rate_hz: int,
        decibels: Sequence[float],
        noises: Sequence[str],
        others: Sequence[Tensor],
        seed: int,
    ) -> None:
        """`decibels`: math.inf is without noise. `noises`: in turn from recording to recording. `others`: the crowd."""
        self._recordings, self._rate_hz, self._decibels = recordings, rate_hz, decibels
        self._noises, self._others, self._seed = noises, others, seed

    def __len__(self) -> int:
        return len(self._recordings) * len(self._decibels)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        """float32 [n]; of one recording the noise is the same at all decibels, but for its loudness."""
        if not 0 <= index < len(self):
            raise IndexError(f"There are examples 0 to {len(self) - 1}, but {index} was asked for.")
        number, version = divmod(index, len(self._decibels))
        name = self._noises[number % len(self._noises)]
        generator = generator_from("at decibels", self._seed, number)
        speech = self._recordings[number].float()
        return noisy(speech, name, self._decibels[version], self._rate_hz, generator, self._others)
