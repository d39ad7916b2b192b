"""The nearest text is the one that shares pieces of words, and rare ones count for more."""

from __future__ import annotations

import pytest

pytest.importorskip("sklearn")
from millrace.models.nearest_texts import nearest_texts

KNOWN = ["file not found", "cannot open", "new window", "the file", "the zebra"]


def test_a_text_is_nearest_to_itself() -> None:
    assert nearest_texts(KNOWN, KNOWN) == list(range(len(KNOWN)))


def test_words_in_another_order_and_form_are_near() -> None:
    assert nearest_texts(["open a file: cannot", "windows", "FOUND"], KNOWN) == [1, 2, 0]


def test_what_is_rare_counts_for_more() -> None:
    known = [*[f"the file {n}" for n in range(9)], "the zebra"]
    assert nearest_texts(["the file of a zebra"], known) == [9]
