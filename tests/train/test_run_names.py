"""A name, or the beginning of one, stands for one run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import RunDirectoryError
from millrace.train.run_names import chosen_name

NAMES = st.lists(st.text("ab-", min_size=1, max_size=6), min_size=1, max_size=6, unique=True)


@given(NAMES, st.text("ab-", max_size=6))
def test_what_is_chosen_is_the_name_or_the_only_one_that_begins_so(names: list[str], asked: str) -> None:
    begin = [name for name in names if asked and name.startswith(asked)]
    try:
        chosen = chosen_name(asked, names, "here")
    except RunDirectoryError:
        assert asked not in names
        assert len(begin) != 1
    else:
        assert chosen == asked or begin == [chosen]


def test_messages() -> None:
    names = [f"digits-{n}" for n in range(6)]
    with pytest.raises(RunDirectoryError, match=r"6 runs begin with 'dig' \(such as digits-2, .*give more of the name"):
        chosen_name("dig", names, "runs/")
    with pytest.raises(RunDirectoryError, match=r"No run is at runs/\. Did you mean 'digits-"):
        chosen_name("digist-1", names, "runs/")
    with pytest.raises(RunDirectoryError, match="There are none"):
        chosen_name("x", [], "runs/")
