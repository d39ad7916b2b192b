"""A batch in slices, one for every replica, and their results put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from millrace.errors import FeedError, SettingError
from millrace.graph.graph import Graph
from millrace.graph.signature import TensorSpec


def sizes_of(examples: int, replicas: int) -> list[int]:
    """How many examples each slice has: as equal as can be, the larger ones first; fewer slices than replicas where
    there are not enough examples."""
    even, more = divmod(examples, replicas)
    return [size for size in (even + (index < more) for index in range(replicas)) if size]


def examples_in(feeds: Sequence[Tensor], names: Sequence[str]) -> int:
    """How many examples a batch has: the length of every feed's first axis.

    Raises: FeedError where they differ, or a feed has no axis.
    """
    lengths = {feed.shape[:1] for feed in feeds}
    if len(lengths) != 1 or () in lengths:
        shapes = ", ".join(f"{name} {list(feed.shape)}" for name, feed in zip(names, feeds, strict=True))
        raise FeedError(f"replicas: all feeds must have the batch as their first axis, but they are {shapes}.")
    ((examples,),) = lengths
    return examples


def whole_of(name: str, values: Sequence[Tensor], sizes: Sequence[int], traced: TensorSpec, examples: int) -> Tensor:
    """What a fetch is for the batch, from what it is for each slice.

    What has a value for every example is put together in order; of the rest a floating value is the mean, weighted by
    examples, and an integer one the sum. As for `passes.microbatch`, a loss must be a mean over the examples.

    Args: traced: what the fetch was when the step was traced, for a batch of so many `examples`.

    Raises: SettingError for a value that is none of these.
    """
    first = values[0]
    if len(values) == 1:
        return first
    shapes = [(size, *traced.shape[1:]) for size in sizes]
    if traced.shape[:1] == (examples,) and [tuple(value.shape) for value in values] == shapes:
        return torch.cat(list(values))
    if any(tuple(value.shape) != traced.shape for value in values):
        raise SettingError(
            f"replicas: the fetch {name!r} was {traced} for a batch of {examples} examples and is "
            f"{', '.join(str(TensorSpec.of(value)) for value in values)} for slices of {', '.join(map(str, sizes))}; "
            "only scalars and what has the batch as its first axis can be put together."
        )
    stacked = torch.stack(list(values))
    if not first.is_floating_point():
        return stacked.sum(0).to(first.dtype)
    weights = torch.tensor(sizes, dtype=first.dtype) / sum(sizes)
    return (stacked * weights.reshape(-1, *[1] * first.dim())).sum(0)


def wholes_of(graph: Graph, results: Sequence[Mapping[str, Tensor]], sizes: Sequence[int]) -> dict[str, Tensor]:
    """The fetches of a step, from those of its slices in order. graph: of the step for some batch."""
    examples = graph.feeds[0].spec.shape[0] if graph.feeds else 0
    specs = {name: TensorSpec.of(graph.node(graph.fetches[name]).meta["val"]) for name in results[0]}
    return {name: whole_of(name, [one[name] for one in results], sizes, specs[name], examples) for name in results[0]}
