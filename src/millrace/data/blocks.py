"""A long text in three parts: block after block, so that each part has something of all that the text is about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from millrace.errors import DataError

_BLOCKS, _LONGEST_BYTES = 20, 16384


class Blocks(NamedTuple):
    """The bytes of each part, uint8 [n]."""

    train: Tensor
    validation: Tensor
    test: Tensor


def blocks(paragraphs: Sequence[str]) -> Blocks:
    """Paragraphs as bytes, a line each, held out in blocks, so that a paragraph is in one part only.

    Of every twenty blocks one is for validation and one, far from it, for the test. The blocks are of 16 KiB, or of a
    twentieth of a text that is shorter than twenty.

    Raises: DataError: there are fewer than twenty paragraphs, or so long ones that a part has none.
    """
    lines = [f"{paragraph}\n".encode() for paragraph in paragraphs]
    if len(lines) < _BLOCKS:
        raise DataError(f"The text has {len(lines)} paragraphs, too few to hold some out: give at least {_BLOCKS}.")
    block_bytes = max(1, min(_LONGEST_BYTES, sum(map(len, lines)) // _BLOCKS))
    parts = (bytearray(), bytearray(), bytearray())
    read = 0
    for line in lines:
        number = read // block_bytes % _BLOCKS
        parts[{_BLOCKS // 2: 1, _BLOCKS - 1: 2}.get(number, 0)].extend(line)
        read += len(line)
    if not all(parts):
        raise DataError("A paragraph of the text is so long that nothing can be held out. Divide it by empty lines.")
    train, validation, test = (torch.from_numpy(np.frombuffer(bytes(part), np.uint8).copy()) for part in parts)
    return Blocks(train, validation, test)
