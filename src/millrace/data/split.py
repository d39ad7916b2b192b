"""Holding examples out."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from millrace.data.randomness import generator_from
from millrace.errors import DataError


class Split(NamedTuple):
    """Two disjoint sets of indices that together are all; each sorted, int64."""

    train: Tensor
    held_out: Tensor


def holdout(count: int, fraction: float, seed: int = 0, labels: Tensor | None = None) -> Split:
    """Hold a random fraction of `count` examples out, as indices.

    With labels, each label is held out in the same proportion, to within one example; the total is the same as without.

    Args:
        count: number of examples.
        fraction: share to hold out, between 0 and 1.
        seed: of the choice.
        labels: [count], integers.

    Raises:
        DataError: the fraction leaves one of the sets empty, or there are not `count` labels.
    """
    wanted = round(count * fraction) if 0 < fraction < 1 else 0
    if not 0 < wanted < count:
        raise DataError(
            f"Holding out fraction={fraction!r} of {count} examples leaves one of the two sets empty. Choose a "
            "fraction between 0 and 1 that gives each at least one example."
        )
    if labels is None:
        labels = torch.zeros(count, dtype=torch.int64)
    if labels.shape != (count,):
        raise DataError(f"There must be one label per example, [{count}], but labels have shape {list(labels.shape)}.")
    order = torch.randperm(count, generator=generator_from("holdout", seed))
    groups = [order[labels.cpu()[order] == label] for label in torch.unique(labels.cpu())]
    quotas = _quotas([len(group) for group in groups], wanted, count)
    held_out = torch.cat([group[:quota] for group, quota in zip(groups, quotas, strict=True)])
    train = torch.cat([group[quota:] for group, quota in zip(groups, quotas, strict=True)])
    return Split(train.sort().values, held_out.sort().values)


def _quotas(sizes: list[int], wanted: int, count: int) -> list[int]:
    """Whole numbers proportional to the sizes that add up to `wanted` (largest remainders; ties to earlier groups)."""
    shares = [size * wanted / count for size in sizes]
    quotas = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(sizes)), key=lambda group: quotas[group] - shares[group])
    for group in by_remainder[: wanted - sum(quotas)]:
        quotas[group] += 1
    return quotas
