"""A random function over batches."""

from __future__ import annotations

from typing import Any

import torch
from tests.data.test_batches import all_same, take

from millrace.data import as_batches, mapped


def noise(batch: Any, generator: torch.Generator) -> Any:
    return torch.rand(3, generator=generator)


def test_every_batch_of_every_epoch_is_changed_differently() -> None:
    draws = take(mapped(as_batches(torch.ones(4), batch_size=2), noise), 6)
    assert len({tuple(draw.tolist()) for draw in draws}) == 6


def test_the_seed_decides() -> None:
    one, again, other = (take(mapped(as_batches(torch.ones(4)), noise, seed=s), 3) for s in (1, 1, 2))
    assert all_same(one, again)
    assert not all_same(one, other)


def test_evaluation_gets_no_augmentation_unless_it_has_a_function_of_its_own() -> None:
    batches = as_batches(torch.ones(4), batch_size=3)
    assert all_same(list(mapped(batches, noise).one_pass()), [torch.ones(3), torch.ones(1)])
    doubled = mapped(batches, noise, evaluation=lambda batch: batch * 2)
    assert all_same(list(doubled.one_pass()), [torch.full((3,), 2.0), torch.full((1,), 2.0)])


def test_epochs_and_positions_are_the_sources() -> None:
    source = as_batches(torch.ones(4), batch_size=2)
    batches = mapped(source, noise)
    take(batches, 3)
    assert (batches.epoch, batches.handed_out, batches.batches_per_epoch) == (1, 3, 2)
    assert batches.position() == source.position()
