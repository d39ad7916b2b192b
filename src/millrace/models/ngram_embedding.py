"""What the last few tokens are together: embeddings of short sequences, which a recurrence need not spell out first.

Shape suffixes: B rows, L tokens, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from millrace.errors import SettingError

_PRIME, _FACTOR = 2**31 - 1, 1_000_003  # their products fit into 63 bits


class NgramEmbedding(nn.Module):
    """Features of the last n tokens at every place, for several n, each from a table of its own.

    A sequence's row is its hash, so that sequences may share one: with more rows it happens less. Tables of short
    sequences learn from a small text what a recurrence of the same cost learns from a large one.

    Source: Pagnoni et al., "Byte latent transformer", 2024, §3.2.1 (hash n-gram embeddings), here one beside the other.
    """

    def __init__(self, orders: Sequence[int], rows: int, width: int, std: float = 0.1) -> None:
        """Args: orders: each n, from 1 on. rows: of each table. width: features of each. std: of fresh ones.

        Raises: SettingError: an order, the rows or the width is no positive number.
        """
        super().__init__()
        if not orders or min(*orders, rows, width) < 1:
            raise SettingError(
                f"An n-gram embedding needs at least one order, all >= 1, and rows and width >= 1, but got "
                f"orders={list(orders)}, rows={rows}, width={width}."
            )
        self.orders, self.rows = tuple(orders), rows
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for _ in orders)
        for table in self.tables:
            nn.init.normal_(table.weight, std=std)  # type: ignore[arg-type]

    @property
    def before(self) -> int:
        """How many tokens before a place are looked at."""
        return max(self.orders) - 1

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Features [B, L - before, orders · D] of all places but the first `before`, which come as context alone."""
        length = tokens_BL.shape[1] - self.before
        hashed = torch.zeros_like(tokens_BL[:, :length])
        wanted: dict[int, Tensor] = {}
        for back in range(max(self.orders)):
            begin = self.before - back
            hashed = (hashed * _FACTOR + tokens_BL[:, begin : begin + length] + 1) % _PRIME
            wanted[back + 1] = hashed
        rows = (wanted[order] * _FACTOR % _PRIME % self.rows for order in self.orders)
        return torch.cat([table(row_BL) for table, row_BL in zip(self.tables, rows, strict=True)], dim=-1)
