"""Data that is read from front to back: one-shot iterators, and objects that save their own place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.data.kinds import StatefulIterator
from tests.data.test_batches import all_same, take

from millrace.data import as_batches
from millrace.errors import DataError


def generated(count: int = 5) -> Iterator[Any]:
    for number in range(count):
        yield torch.tensor([float(number)]), torch.rand(1)


def test_a_generator_is_one_epoch() -> None:
    batches = as_batches(generated())
    assert len(list(batches.until(epochs=1))) == 5
    assert batches.epoch == 1
    assert batches.exhausted


def test_a_generator_that_ends_early_says_when_and_what_was_asked() -> None:
    batches = as_batches(generated())
    with pytest.raises(DataError, match=r"(?s)ended after 5 batches, but 8 batches .* function that makes a fresh"):
        list(batches.until(batches=8))
    with pytest.raises(DataError, match="ended after 5 batches, but 3 epochs had"):
        list(as_batches(generated()).until(epochs=3))
    with pytest.raises(DataError, match="but an endless stream had"):
        list(as_batches(generated()))
    with pytest.raises(DataError, match="ended after 5 batches"):
        batches.advance()


def test_a_generator_may_end_exactly_where_asked() -> None:
    assert len(list(as_batches(generated()).until(batches=5))) == 5


def test_a_fresh_generator_resumes() -> None:
    expected = list(as_batches(generated()).until(epochs=1))
    begun = as_batches(generated())
    take(begun, 2)
    resumed = as_batches(generated())
    resumed.seek(begun.position())
    assert all_same(list(resumed.until(epochs=1)), expected[2:])


def test_a_generator_goes_forward_but_not_back() -> None:
    expected = list(as_batches(generated()).until(epochs=1))
    batches = as_batches(generated())
    position = batches.position()
    take(batches, 2)
    batches.seek({**batches.position(), "batch": 3, "handed_out": 3})
    assert all_same(take(batches, 1), expected[3:4])
    batches.seek(position)
    with pytest.raises(DataError, match="cannot go back to batch 0: 4 batches have left it"):
        batches.advance()


def test_a_generator_gives_one_pass_at_most() -> None:
    batches = as_batches(generated())
    assert len(list(batches.one_pass())) == 5
    with pytest.raises(DataError, match="can be read only once"):
        list(batches.one_pass())
    with pytest.raises(DataError, match="cannot go back"):
        batches.advance()


def test_a_saved_place_is_used_where_json_can_carry_it() -> None:
    begun = as_batches(StatefulIterator(9))
    take(begun, 4)
    saved = json.loads(json.dumps(begun.position()))
    assert saved["state"] == {"at": 4}
    source = StatefulIterator(9)
    resumed = as_batches(source)
    resumed.seek(saved)
    assert all_same(take(resumed, 3), take(begun, 3))
    assert source.reads == 3


@pytest.mark.parametrize(
    "awkward", [lambda at: torch.tensor(at), lambda at: (at,), lambda at: {1: at}, lambda at: {at}]
)
def test_other_saved_places_are_reached_by_reading(awkward: Any) -> None:
    class Awkward(StatefulIterator):
        def state_dict(self) -> dict[str, Any]:
            return {"at": self.at, "more": awkward(self.at)}

    begun = as_batches(Awkward(9))
    take(begun, 4)
    assert "state" not in begun.position()
    resumed = as_batches(Awkward(9))
    resumed.seek(json.loads(json.dumps(begun.position())))
    assert all_same(take(resumed, 9), take(begun, 9))


def test_the_saved_place_survives_closing() -> None:
    batches = as_batches(StatefulIterator(9))
    take(batches, 4)
    position = batches.position()
    batches.close()
    assert batches.position() == position
    list(batches.one_pass())
    assert batches.position() == position
