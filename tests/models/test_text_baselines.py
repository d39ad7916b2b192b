"""What a model is measured against: a mixture is at least about as good as either, and compressors as they are."""

from __future__ import annotations

import gzip

import pytest
import torch

from millrace.data.streams import StreamBatches, stream_batches
from millrace.models.ngram import KneserNey
from millrace.models.text_baselines import Said, baselines

LINES = b"".join(b"%d green bottles hanging on the wall, " % (n * 7919 % 1000) for n in range(200))


def part(content: bytes) -> StreamBatches:
    return stream_batches(torch.frombuffer(bytearray(content), dtype=torch.uint8), 2, 16)


def evenly(batches: StreamBatches) -> Said:
    """Somebody who takes all bytes for equally likely."""
    return Said(batches, batches.of_targets(torch.full((len(batches.tokens),), -8.0, dtype=torch.float64)))


def surely(batches: StreamBatches) -> Said:
    """Somebody who nearly knows the text."""
    return Said(batches, batches.of_targets(torch.full((len(batches.tokens),), -0.01, dtype=torch.float64)))


def test_who_knows_nothing_gets_no_share_and_who_knows_all_gets_everything() -> None:
    train, validation, test = part(LINES[:4000]), part(LINES[4000:5500]), part(LINES[5500:])
    found = baselines(train, evenly(validation), evenly(test))
    assert found["0% of this model and 100% of the 5-gram"] == found["5-gram, interpolated Kneser-Ney"]
    found = baselines(train, surely(validation), surely(test))
    assert found["100% of this model and 0% of the 5-gram"] == pytest.approx(0.01)


def test_the_5_gram_is_counted_on_the_training_text() -> None:
    train, validation, test = part(LINES[:4000]), part(LINES[4000:5500]), part(LINES[5500:])
    found = baselines(train, evenly(validation), evenly(test))["5-gram, interpolated Kneser-Ney"]
    all_bytes = KneserNey(train.tokens.numpy(), 5, 256).bits(test.tokens.numpy())
    assert found == pytest.approx(all_bytes, rel=0.1)  # without each stream's first byte and the rest at its end
    assert found < 3


def test_compressors_read_the_text_alone_or_after_the_training_text() -> None:
    train, validation, test = part(LINES[:4000]), part(LINES[4000:5500]), part(LINES[5500:])
    found = baselines(train, evenly(validation), evenly(test))
    alone = 8 * len(gzip.compress(LINES[5500:], 9, mtime=0)) / len(LINES[5500:])
    assert found["gzip -9, of the test text alone"] == pytest.approx(alone)
    for name in ("gzip -9", "xz -9"):
        assert found[f"{name}, which read the training text before"] < found[f"{name}, of the test text alone"]
