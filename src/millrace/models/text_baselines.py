"""What a language model of bytes is measured against: counting, both of them mixed, and compressors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from millrace.data.compression import COMPRESSORS, bits_per_byte
from millrace.data.streams import StreamBatches
from millrace.models.byte_lstm import BYTES
from millrace.models.ngram import KneserNey

_ORDER = 5
_SHARES = [part / 20 for part in range(21)]  # of the model beside the 5-gram


class Said(NamedTuple):
    """A part of a text, and what a model says of it."""

    text: StreamBatches
    log2: Tensor  # of the probabilities of all targets, float64 [streams, bytes], as `log2_probabilities` has them


def baselines(train: StreamBatches, validation: Said, test: Said) -> dict[str, float]:
    """Bits per byte of the test text, by who says how likely it is.

    Args:
        train: what was learned from, which is counted, and which compressors have read before.
        validation: on which it is chosen how much of either a mixture has.
        test: measured.

    Returns: of a 5-gram, of a mixture of it and the model, and of gzip and xz, by their names.
    """
    grams = KneserNey(train.tokens.numpy(), _ORDER, BYTES)
    counted, counted_too = (_counted(grams, part.text) for part in (test, validation))
    share = min(_SHARES, key=lambda share: _mixed(validation.log2, counted_too, share))
    found = {
        f"{_ORDER}-gram, interpolated Kneser-Ney": float(-counted.mean()),
        f"{share:.0%} of this model and {1 - share:.0%} of the {_ORDER}-gram": _mixed(test.log2, counted, share),
    }
    content, after = (part.tokens.numpy().astype(np.uint8).tobytes() for part in (test.text, train))
    for name, compress in COMPRESSORS.items():
        found[f"{name}, which read the training text before"] = bits_per_byte(compress, content, after)
        found[f"{name}, of the test text alone"] = bits_per_byte(compress, content)
    return found


def _counted(model: KneserNey, text: StreamBatches) -> Tensor:
    """What counting says of the same targets as a model, [streams, bytes]."""
    return text.of_targets(torch.from_numpy(model.probabilities(text.tokens.numpy()))).log2()


def _mixed(learned: Tensor, counted: Tensor, share: float) -> float:
    """Bits per byte of what two models say together, one with this share, the other with the rest."""
    return float(-(share * learned.exp2() + (1 - share) * counted.exp2()).log2().mean())
