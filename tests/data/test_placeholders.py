"""Placeholders: found, marked alike on both sides, and put back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.data.placeholders import MARKS, masked, masked_like, readable, restored

ONE, TWO = MARKS[:2]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("%(name)s has %(count)d", ["%(name)s", "%(count)d"]),
        ("%s: %-5.2lf %1$s %%", ["%s", "%-5.2lf", "%1$s"]),
        ("{} of {0:>4} {user.name!r}", ["{}", "{user.name!r}"]),
        ("$HOME and ${user}", ["$HOME", "${user}"]),
        ("100% done, 5 % of it, a%b", []),
        ("cost: $5", []),
    ],
)
def test_placeholders_are_found(text: str, names: list[str]) -> None:
    found = masked(text)
    assert found is not None
    assert found[1] == names
    assert all(name not in found[0] for name in names)


def test_translations_may_have_them_in_another_order() -> None:
    marked, names = masked("%(a)s before %(b)s") or ("", [])
    assert marked == f"{ONE} before {TWO}"
    assert masked_like("%(b)s après %(a)s", names) == f"{TWO} après {ONE}"


@pytest.mark.parametrize("other", ["%(a)s", "%(a)s %(b)s %(b)s", "%(a)s %(c)s"])
def test_translations_with_others_are_refused(other: str) -> None:
    assert masked_like(other, ["%(a)s", "%(b)s"]) is None


pieces = st.sampled_from(["%s", "%(name)s", "{}", "word", "é", " ", "100%", "%d"])


@given(st.lists(pieces, max_size=9).map(" ".join))
def test_what_was_marked_can_be_put_back(text: str) -> None:
    found = masked(text)
    assert found is not None
    marked, names = found
    assert restored(marked, names) == text
    assert masked_like(text, names) == marked


def test_too_many_are_refused_and_unknown_marks_dropped() -> None:
    assert masked("%s " * (len(MARKS) + 1)) is None
    assert restored(f"a {TWO}{ONE}", ["%s"]) == "a %s"


def test_marks_and_parts_of_characters_can_be_read() -> None:
    assert readable(f"{TWO} of {ONE}: caf\ufffd, naïve") == "<2> of <1>: caf?, naïve"
