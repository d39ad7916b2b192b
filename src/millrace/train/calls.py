"""Which batches go to the session together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor


def grouped(batches: Iterator[Any], most: int, ends: Callable[[], bool]) -> Iterator[list[Any]]:
    """So many batches at a time; fewer before one of another form, at the end, and where `ends` says so."""
    group: list[Any] = []
    for batch in batches:
        if group and _form(batch) != _form(group[0]):
            yield group
            group = []
        group.append(batch)
        if len(group) == most or ends():
            yield group
            group = []
    if group:
        yield group


def stretch(first: Any, batches: Iterator[Any], ends: Callable[[], bool]) -> Iterator[Any]:
    """A batch and those after it, up to where `ends` says so."""
    yield first
    while not ends():
        try:
            batch = next(batches)
        except StopIteration:
            return
        yield batch


def _form(batch: Any) -> tuple[Any, ...]:
    """What batches that are stacked for one call must have in common; stacking would convert dtypes without a word."""
    leaves, nest = pytree.tree_flatten(batch)
    return nest, *((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else None for leaf in leaves)
