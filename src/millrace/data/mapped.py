"""A function applied to every batch, with randomness that resumes exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from millrace.data.batches import Batch, Batches, Json
from millrace.data.randomness import generator_from


class MappedBatches(Batches):
    """The batches of another source, each passed through a function; see `mapped`."""

    def __init__(
        self,
        batches: Batches,
        function: Callable[[Batch, torch.Generator], Batch],
        seed: int,
        evaluation: Callable[[Batch], Batch] | None,
    ) -> None:
        self.name = batches.name
        self.draws_global_random = batches.draws_global_random
        self._batches = batches
        self._function = function
        self._seed = seed
        self._evaluation = evaluation

    @property
    def epoch(self) -> int:
        return self._batches.epoch

    @property
    def handed_out(self) -> int:
        return self._batches.handed_out

    @property
    def batches_per_epoch(self) -> int | None:
        return self._batches.batches_per_epoch

    @property
    def exhausted(self) -> bool:
        return self._batches.exhausted

    def advance(self) -> Batch | None:
        batch = self._batches.advance()
        if batch is None:
            return None
        generator = generator_from("map", self._seed, self._batches.handed_out)
        return self._function(batch, generator)

    def position(self) -> dict[str, Json]:
        return self._batches.position()

    def seek(self, position: Mapping[str, Json]) -> None:
        self._batches.seek(position)

    def one_pass(self) -> Iterator[Batch]:
        for batch in self._batches.one_pass():
            yield batch if self._evaluation is None else self._evaluation(batch)

    def close(self) -> None:
        self._batches.close()


def mapped(
    batches: Batches,
    function: Callable[[Batch, torch.Generator], Batch],
    *,
    seed: int = 0,
    evaluation: Callable[[Batch], Batch] | None = None,
) -> Batches:
    """Batches passed through a random function, such as an augmentation.

    The generator that `function` gets is seeded from (seed, the batch's number since position zero), so a batch is
    augmented in the same way whenever and wherever it is read, and differently in every epoch.

    Args:
        batches: the source.
        function: (batch, CPU generator) → batch; it must draw random numbers from the generator alone.
        seed: of the function's randomness.
        evaluation: batch → batch for `one_pass`, which otherwise gives the source's batches as they are, because
            evaluation wants no augmentation.
    """
    return MappedBatches(batches, function, seed, evaluation)
