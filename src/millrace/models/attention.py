"""Attention: what a sequence takes from another one (or from itself), and how much of it from where.

Shape suffixes: B examples, T queries, S places of the memory, D features, H heads, K features of a head.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from millrace.errors import SettingError


class Attention(nn.Module):
    """Scaled products of queries and keys, in one head or several, that also tells its weights.

    With one head it is the "general" score of Luong et al., "Effective approaches to attention-based neural machine
    translation", 2015; with several that of Vaswani et al., "Attention is all you need", 2017, §3.2.

    Args:
        width: D, of queries and results.
        heads: H; must divide the width.
        dropout: share of the weights left out in training.

    Raises: SettingError: the heads do not divide the width.
    """

    def __init__(self, width: int, heads: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise SettingError(f"heads={heads} must divide width={width}, so that each gets as many features.")
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query_BTD: Tensor, memory_BSD: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """What the queries find, [B, T, D], and the heads' mean weights, [B, T, S], which sum to 1 over S.

        Args:
            query_BTD, memory_BSD: who asks, and who is asked.
            seen: bool [B or 1, T or 1, S], which places a query may look at: at least one for each.
        """
        q_BHTK = self._split(self.query(query_BTD))
        k_BHSK, v_BHSK = (self._split(part) for part in self.key_value(memory_BSD).chunk(2, dim=-1))
        scores_BHTS = q_BHTK @ k_BHSK.transpose(-1, -2) / k_BHSK.shape[-1] ** 0.5
        scores_BHTS = scores_BHTS.masked_fill(~seen[:, None], torch.finfo(scores_BHTS.dtype).min)
        weights_BHTS = scores_BHTS.softmax(-1)
        found_BTD = (self.dropout(weights_BHTS) @ v_BHSK).transpose(1, 2).flatten(2)
        return cast(Tensor, self.out(found_BTD)), weights_BHTS.mean(1)

    def _split(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def causal(queries: int, places: int, device: torch.device) -> Tensor:
    """Which places a query may look at when none may see what comes later: bool [1, queries, places].

    The last query belongs to the last place.
    """
    return torch.ones(1, queries, places, dtype=torch.bool, device=device).tril(places - queries)
