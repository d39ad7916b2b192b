"""Token sequences of many lengths as one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def padded(rows: Sequence[Sequence[int]], length: int, pad: int = 0) -> Tensor:
    """Rows of tokens, each cut or filled to one length: int64 [rows, length].

    Args:
        rows: of tokens.
        length: of all of them, in tokens.
        pad: the token after the end of shorter ones.
    """
    found = torch.full((len(rows), length), pad, dtype=torch.int64)
    for number, row in enumerate(rows):
        kept = row[:length]
        found[number, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
    return found
