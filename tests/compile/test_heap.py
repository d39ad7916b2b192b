"""Freed memory goes back to the system."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from millrace.compile.heap import give_back_freed_memory

PAGES = Path("/proc/self/statm")


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of the process")
def test_small_freed_pieces_are_given_back() -> None:
    kept = []
    pieces = []
    for number in range(200_000):  # each of them too small for a mapping of its own
        piece = bytes(1000)
        (kept if number % 1000 == 0 else pieces).append(piece)
    del pieces, piece
    before = int(PAGES.read_text().split()[1])
    give_back_freed_memory()
    after = int(PAGES.read_text().split()[1])
    assert len(kept) == 200
    assert after <= before
