"""Layers whose connections follow the blocks that a model is divided into.

Between two dense layers every block needs the outputs of all others. Where a block reads only its own part of the layer
below, nothing moves; such layers, with a dense one now and then, are what large models were divided by when links were
slow (Dean et al., "Large scale distributed deep networks", NIPS 2012, §3: locally connected models scale best).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from millrace.errors import SettingError


class GroupedLinear(nn.Module):
    """`partitions` linear layers side by side: output block i sees only input block i.

    Args: in_features, out_features: of all blocks together; multiples of `partitions`.
    Raises: SettingError when they are not.
    """

    def __init__(self, in_features: int, out_features: int, partitions: int, *, bias: bool = True) -> None:
        super().__init__()
        for name, extent in (("in_features", in_features), ("out_features", out_features)):
            if partitions < 1 or extent < 1 or extent % partitions:
                raise SettingError(
                    f"GroupedLinear: {name}={extent} cannot be divided into {partitions} equal blocks. Choose a "
                    "multiple of the number of partitions."
                )
        self.in_features, self.out_features, self.partitions = in_features, out_features, partitions
        bound = 1 / math.sqrt(in_features // partitions)  # as nn.Linear draws them
        shape = (partitions, out_features // partitions, in_features // partitions)
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        drawn = torch.empty(partitions, 1, shape[1]).uniform_(-bound, bound)
        self.bias = nn.Parameter(drawn) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[…, in_features] → […, out_features]."""
        blocks = x.reshape(-1, self.partitions, self.in_features // self.partitions).transpose(0, 1)
        weight = self.weight.transpose(1, 2)
        made = torch.bmm(blocks, weight) if self.bias is None else torch.baddbmm(self.bias, blocks, weight)
        return made.transpose(0, 1).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, partitions={self.partitions}, bias={self.bias is not None}"


def partitioned_stack(
    sizes: Sequence[int],
    partitions: int,
    *,
    exchange_every: int,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Linear layers of which only every `exchange_every`-th connects all blocks with all; the others are grouped.

    Args:
        sizes: features of the input and of every layer after it.
        exchange_every: 1 makes every layer dense; 3 makes the 1st, 4th, 7th, … dense. The first is dense, since the
            input belongs to no block.
        activation: makes what stands between two layers.
    """
    if len(sizes) < 2 or exchange_every < 1:
        raise SettingError(
            f"partitioned_stack: expected at least two sizes and exchange_every of at least 1, got sizes={list(sizes)} "
            f"and exchange_every={exchange_every}"
        )
    layers: list[nn.Module] = []
    for number, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        dense = number % exchange_every == 0
        layers.append(nn.Linear(fan_in, fan_out) if dense else GroupedLinear(fan_in, fan_out, partitions))
        layers.append(activation())
    return nn.Sequential(*layers[:-1])
