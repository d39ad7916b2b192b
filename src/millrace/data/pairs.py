"""Batches of token sequences in pairs, of few shapes: pairs of about one length together, padded to a common one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from millrace.data.batches import Batch, EpochBatches, Json
from millrace.data.padding import padded
from millrace.data.randomness import generator_from
from millrace.errors import DataError

TokenPair = tuple[Sequence[int], Sequence[int]]
_WORTH_IT = 0.8  # of the length of the next shape, for a graph of its own


class PairBatches(EpochBatches):
    """An endless stream of {"source": [B, S], "target": [B, T]}, both int64, padded with zeros.

    Every shape is one of `buckets`, since each shape costs a graph: a pair goes to the first bucket that both of its
    sides fit. An epoch has every pair once, but for the rests that fill no batch; the order of buckets is random.

    Args:
        pairs: source and target tokens.
        batch_size: B, pairs of one bucket.
        buckets: S and T of each, the shortest first.
        seed: of the order.

    Raises:
        DataError: a pair fits no bucket, or no bucket has enough pairs for a batch.
    """

    draws_global_random = False

    def __init__(
        self, pairs: Sequence[TokenPair], batch_size: int, buckets: Sequence[tuple[int, int]], seed: int = 0
    ) -> None:
        identity: dict[str, Json] = {"pairs": len(pairs), "batch_size": batch_size, "seed": seed}
        identity["buckets"] = [[source, target] for source, target in buckets]
        super().__init__("the sentence pairs", identity)
        self.pairs = pairs
        self._batch_size, self._seed = batch_size, seed
        members: list[list[TokenPair]] = [[] for _ in buckets]
        for source, target in pairs:
            members[_bucket(len(source), len(target), buckets)].append((source, target))
        self._buckets = [
            (padded([s for s, _ in inside], shape[0]), padded([t for _, t in inside], shape[1]))
            for inside, shape in zip(members, buckets, strict=True)
            if inside
        ]
        if not self.batches_per_epoch:
            raise DataError(
                f"There are {len(pairs)} sentence pairs, too few of about one length for a batch of "
                f"batch_size={batch_size}. Give more pairs, or a smaller batch_size."
            )

    @property
    def batches_per_epoch(self) -> int:
        return sum(len(source) // self._batch_size for source, _ in self._buckets)

    def _read_epoch(self, epoch: int, first: int) -> Iterator[Batch]:
        generator = generator_from("order", self._seed, epoch)
        batches: list[tuple[int, Tensor]] = []
        for number, (source, _) in enumerate(self._buckets):
            order = torch.randperm(len(source), generator=generator)
            whole = len(source) // self._batch_size
            batches += [(number, indices) for indices in order.split(self._batch_size)[:whole]]
        for place in torch.randperm(len(batches), generator=generator).tolist()[first:]:
            yield self._fetch(*batches[place])

    def one_pass(self) -> Iterator[Batch]:
        for number, (source, _) in enumerate(self._buckets):
            for indices in torch.arange(len(source)).split(self._batch_size):
                yield self._fetch(number, indices)

    def _fetch(self, bucket: int, indices: Tensor) -> Batch:
        source, target = self._buckets[bucket]
        return {"source": source[indices], "target": target[indices]}


def buckets_for(pairs: Sequence[TokenPair], shares: Sequence[float] = (0.5, 0.85, 1.0)) -> list[tuple[int, int]]:
    """Shapes of which each holds at least such a share of the pairs; one that saves little over the next is left out.

    Args: shares: ascending, the last one 1.
    """
    by_length = sorted((max(len(source), len(target)), len(source), len(target)) for source, target in pairs)
    shapes: list[tuple[int, int]] = []
    for share in reversed(shares):
        inside = by_length[: max(1, round(share * len(by_length)))]
        shape = max(source for _, source, _ in inside), max(target for _, _, target in inside)
        if not shapes or sum(shape) <= _WORTH_IT * sum(shapes[-1]):
            shapes.append(shape)
    return shapes[::-1]


def _bucket(source: int, target: int, buckets: Sequence[tuple[int, int]]) -> int:
    for number, (longest_source, longest_target) in enumerate(buckets):
        if source <= longest_source and target <= longest_target:
            return number
    raise DataError(
        f"A pair of {source} source tokens and {target} target tokens fits none of the buckets {list(buckets)}. Leave "
        "such pairs out, or add a longer bucket."
    )
