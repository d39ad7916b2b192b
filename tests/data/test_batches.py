"""What every kind of source must hold to, whatever it reads."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.kinds import ALL, EXAMPLES, Make

from millrace.data import Batch, Batches
from millrace.data.nest import leaves
from millrace.errors import DataError

# The user's own order: a seed does not change it, or there is no shuffling at all.
OWN_ORDER = [EXAMPLES["Hugging Face stream"]]
NOT_SHUFFLED = [make for kind, make in EXAMPLES.items() if kind == "stateful loader of a stream"]
SETTINGS = settings(max_examples=8, deadline=None)
every_kind = pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
SIZES = {"n": st.integers(1, 11), "batch_size": st.integers(1, 5), "seed": st.integers(0, 3)}


def same(a: Batch, b: Batch) -> bool:
    """Equal structure, dtypes and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def all_same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def take(batches: Batches, count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def numbers(batches: list[Batch]) -> list[int]:
    """The numbers of the examples in batches of kinds.EXAMPLES, found in the first tensor."""

    def first(batch: Any) -> torch.Tensor:
        if isinstance(batch, dict) and "y" in batch and isinstance(batch["y"], torch.Tensor):
            return batch["y"]
        tensor = next(leaves(batch))[1]
        return tensor[:, 0] if tensor.ndim == 2 else tensor

    return [int(number) for batch in batches for number in first(batch)]


@every_kind
@SETTINGS
@given(**SIZES, done=st.integers(0, 14), more=st.integers(1, 12))
def test_a_position_continues_as_if_uninterrupted(
    make: Make, n: int, batch_size: int, seed: int, done: int, more: int
) -> None:
    with make(n, batch_size, seed) as whole:
        expected = take(whole, done + more)
    with make(n, batch_size, seed) as interrupted:
        before = take(interrupted, done)
        saved = json.dumps(interrupted.position())
    with make(n, batch_size, seed) as resumed:
        resumed.seek(json.loads(saved))
        assert json.loads(json.dumps(resumed.position())) == json.loads(saved)
        after = take(resumed, more)
        assert (resumed.epoch, resumed.handed_out) == (whole.epoch, whole.handed_out)
        assert resumed.position() == whole.position()
    assert all_same(before + after, expected)


@every_kind
@SETTINGS
@given(**SIZES, done=st.integers(0, 9), further=st.integers(0, 9))
def test_seeking_back_in_the_same_object_repeats(
    make: Make, n: int, batch_size: int, seed: int, done: int, further: int
) -> None:
    with make(n, batch_size, seed) as batches:
        take(batches, done)
        saved = batches.position()
        first = take(batches, further)
        batches.seek(saved)
        assert all_same(take(batches, further), first)


@every_kind
def test_the_global_random_state_stays_untouched(make: Make) -> None:
    batches = make(7, 2, 0)  # making a loader may draw
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    np.random.randn()  # noqa: NPY002  (leaves a second number waiting, which must survive too)
    undisturbed = (torch.get_rng_state(), random.getstate(), repr(np.random.get_state(legacy=False)))  # noqa: NPY002
    with batches:
        take(batches, 9)
        batches.seek(batches.position())
        take(batches, 2)
        list(batches.one_pass())
    after = (torch.get_rng_state(), random.getstate(), repr(np.random.get_state(legacy=False)))  # noqa: NPY002
    assert torch.equal(undisturbed[0], after[0])
    assert undisturbed[1:] == after[1:]


@every_kind
def test_the_global_random_state_does_not_matter(make: Make) -> None:
    runs = []
    for state in (1, 2):
        torch.manual_seed(state)
        random.seed(state)
        np.random.seed(state)  # noqa: NPY002
        with make(7, 2, 0) as batches:
            runs.append(take(batches, 9))
    assert all_same(*runs)


@pytest.mark.parametrize("make", EXAMPLES.values(), ids=EXAMPLES.keys())
@SETTINGS
@given(**SIZES)
def test_each_epoch_and_each_pass_cover_every_example_once(make: Make, n: int, batch_size: int, seed: int) -> None:
    with make(n, batch_size, seed) as batches:
        for epoch in range(2):
            read = list(batches.until(epochs=epoch + 1))
            assert sorted(numbers(read)) == list(range(n))
            assert len(read) == -(-n // batch_size)
            assert batches.batches_per_epoch in (None, len(read))
            assert batches.epoch == epoch + 1
        assert sorted(numbers(list(batches.one_pass()))) == list(range(n))


@pytest.mark.parametrize("make", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_shuffles_differ_between_epochs_and_seeds_and_agree_for_equal_seeds(make: Make) -> None:
    with make(40, 8, 0) as batches, make(40, 8, 0) as again, make(40, 8, 1) as other:
        epochs = [numbers(list(batches.until(epochs=epoch))) for epoch in (1, 2)]
        assert (epochs[0] != epochs[1]) == (make not in NOT_SHUFFLED)
        assert epochs[0] == numbers(list(again.until(epochs=1)))
        if make not in OWN_ORDER + NOT_SHUFFLED:
            assert epochs[0] != numbers(list(other.until(epochs=1)))


@every_kind
def test_evaluation_repeats_and_leaves_training_alone(make: Make) -> None:
    with make(9, 2, 0) as undisturbed:
        expected = take(undisturbed, 8)
    with make(9, 2, 0) as batches:
        before = take(batches, 3)
        first = list(batches.one_pass())
        position = batches.position()
        assert all_same(first, list(batches.one_pass()))
        assert batches.position() == position
        assert all_same(before + take(batches, 5), expected)


NOISY = [
    kind for kind in ALL if kind.startswith(("loader", "stateful")) and "tensors" not in kind and "subset" not in kind
]


@pytest.mark.parametrize("kind", [*NOISY, "Dataset", "torch stream", "function", "iterable", "Hugging Face transform"])
def test_noise_is_another_in_every_batch_and_epoch(kind: str) -> None:
    def noise(batch: Batch) -> tuple[float, ...]:
        """The fractions of all numbers in a batch: indices have none."""
        return tuple(float(x) % 1 for _, tensor in leaves(batch) for x in tensor.flatten() if float(x) % 1)

    with ALL[kind](6, 1, 0) as batches:
        drawn = [number for batch in take(batches, 18) for number in noise(batch)]
    assert len(drawn) >= 18
    assert len(set(drawn)) == len(drawn)


def test_until_counts_from_position_zero_and_can_be_left_and_entered() -> None:
    batches = ALL["tensor"](6, 2, 0)
    first = [batch for batch, _ in zip(batches.until(epochs=2), range(2), strict=False)]
    rest = list(batches.until(epochs=2))
    assert len(first) == 2
    assert batches.handed_out == 6
    assert len(rest) == 4 or len(rest) == 3
    assert list(batches.until(batches=6)) == []
    assert len(list(batches.until(batches=8, epochs=9))) == 2
    assert len(list(batches.until(batches=99, epochs=3))) == 1


def test_a_position_of_other_settings_is_refused_by_name() -> None:
    saved = ALL["tensor"](10, 2, 0).position()
    with pytest.raises(DataError, match="batch_size was 2 and is now 3"):
        ALL["tensor"](10, 3, 0).seek(saved)
    with pytest.raises(DataError, match="examples was 10 and is now 11"):
        ALL["tensor"](11, 2, 0).seek(saved)
    with pytest.raises(DataError, match="seed was 0 and is now 1"):
        ALL["loader"](10, 2, 1).seek(ALL["loader"](10, 2, 0).position())


@pytest.mark.parametrize("damage", [{"epoch": -1}, {"batch": None}, {"batch": 1.5}, {"handed_out": True}, {"batch": 6}])
def test_a_damaged_position_is_refused(damage: dict[str, Any]) -> None:
    batches = ALL["tensor"](10, 2, 0)
    take(batches, 2)
    with pytest.raises(DataError, match="position"):
        batches.seek({**batches.position(), **damage})
    assert batches.handed_out == 2


def test_data_that_became_shorter_is_noticed_on_resume() -> None:
    batches = ALL["function"](9, 1, 0)
    take(batches, 8)
    shorter = ALL["function"](5, 1, 0)
    shorter.seek(batches.position())
    with pytest.raises(DataError, match="ended after 5 batches on the way to the saved position"):
        shorter.advance()
