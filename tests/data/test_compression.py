"""Compressors: what they need for a text, alone and after another."""

from __future__ import annotations

import random

import pytest

from millrace.data.compression import COMPRESSORS, bits_per_byte
from millrace.errors import DataError

NOISE = random.Random(0).randbytes(20_000)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_noise_needs_its_bits_and_repetition_none(name: str) -> None:
    assert 8 < bits_per_byte(COMPRESSORS[name], NOISE) < 8.1
    assert bits_per_byte(COMPRESSORS[name], b"a" * 20_000) < 0.1


@pytest.mark.parametrize("name", COMPRESSORS)
def test_what_was_read_before_is_known(name: str) -> None:
    assert bits_per_byte(COMPRESSORS[name], NOISE, after=NOISE) < 0.5
    assert bits_per_byte(COMPRESSORS[name], NOISE[:10_000], after=NOISE[10_000:]) > 7.9


def test_gzip_forgets_what_xz_remembers() -> None:
    after = NOISE + random.Random(1).randbytes(40_000)
    assert bits_per_byte(COMPRESSORS["gzip -9"], NOISE, after) > 7.9
    assert bits_per_byte(COMPRESSORS["xz -9"], NOISE, after) < 0.5


def test_nothing_has_no_bits() -> None:
    with pytest.raises(DataError, match="empty"):
        bits_per_byte(COMPRESSORS["xz -9"], b"")
