"""The exception tree: one base, every one survives pickling, and suggestions are near."""

from __future__ import annotations

import inspect
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace import errors
from millrace.errors import MillraceError, did_you_mean

TREE = [e for _, e in inspect.getmembers(errors, inspect.isclass) if issubclass(e, MillraceError)]


@pytest.mark.parametrize("kind", TREE)
def test_every_exception_is_in_the_tree_of_the_docstring_and_crosses_processes(kind: type[MillraceError]) -> None:
    assert f" {kind.__name__} " in f" {' '.join((errors.__doc__ or '').split())} "
    error = kind("who\nexpected, got: what to do")
    error.add_note("at step 3")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error) == "who\nexpected, got: what to do"
    assert again.__notes__ == ["at step 3"]


def test_the_tree_is_the_docstrings_and_no_more() -> None:
    drawn = {word for word in (errors.__doc__ or "").split() if word.endswith("Error")}
    assert drawn == {kind.__name__ for kind in TREE}


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.FetchError, KeyError),
        (errors.FeedError, ValueError),
        (errors.DataError, ValueError),
        (errors.SettingError, ValueError),
        (errors.StepError, RuntimeError),
        (errors.NonFiniteError, ArithmeticError),
        (errors.DamagedCheckpointError, errors.CheckpointError),
    ],
)
def test_those_who_do_not_know_millrace_may_catch_pythons_own(kind: type[Exception], builtin: type[Exception]) -> None:
    with pytest.raises(builtin):
        raise kind("it is so")


def test_near_names_are_suggested_and_otherwise_what_there_is() -> None:
    assert did_you_mean("los", ["loss", "accuracy"]) == "Did you mean 'loss'?"
    assert did_you_mean("xyz", ["loss", "accuracy"]) == "Known: accuracy, loss."
    assert did_you_mean("xyz", []) == "There are none."
    assert did_you_mean("xyz", [f"q{n:02}" for n in range(20)]).endswith("q11, ….")


@given(st.lists(st.text("abcdef", min_size=4, max_size=8), min_size=1, max_size=20, unique=True), st.data())
def test_one_slip_of_the_finger_is_always_understood(known: list[str], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(known))
    at = data.draw(st.integers(0, len(name) - 1))
    slipped = name[:at] + name[at + 1 :]
    suggestion = did_you_mean(slipped, known)
    assert suggestion.startswith("Did you mean ")
    if len(known) <= 3:
        assert repr(name) in suggestion
