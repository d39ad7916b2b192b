"""Labels and indices out of range, found before the step runs.

An operator that looks up a place by number (a loss by its labels, an embedding by its tokens) fails on a number that is
out of range. Run eagerly it raises; compiled it ends the process from within its threads on a CPU, and leaves the whole
device unusable on a GPU, with everything that was trained since the last checkpoint. So what a batch brings to such
operators is looked at first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from millrace.errors import FeedError
from millrace.graph.checked_index import checked_index
from millrace.graph.graph import Graph, spec_of
from millrace.runtime.watch import describe

aten = torch.ops.aten

_SAME_VALUES = {aten._to_copy.default, aten.clone.default, aten.contiguous.default}
_RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_NLL = {aten.nll_loss_forward.default, aten.nll_loss2d_forward.default}
_IGNORED_ARGUMENT = 4  # of the two losses: the label that counts for nothing
_BY_DIMENSION = {aten.index_select.default, aten.gather.default, aten.scatter.src, aten.scatter.value}
_BY_LIST = {aten.index.Tensor, aten.index_put.default}


@dataclass(frozen=True)
class Range:
    """What one operator asks of one feed: `low` to `high`, both ends included, or `ignored`.

    views: the operators between the two, which pick or arrange values and change none.
    """

    feed: int  # position among the graph's feeds
    name: str
    views: tuple[Node, ...]
    low: int
    high: int
    ignored: int | None
    user: str  # the operator, in words


def feed_ranges(graph: Graph) -> tuple[Range, ...]:
    """The ranges that the operators of `graph` ask of its integer feeds."""
    inputs = graph.placeholders()
    found: dict[Any, Range] = {}
    for position, feed in enumerate(graph.feeds):
        if feed.spec.dtype.is_floating_point or feed.spec.dtype in (torch.bool, torch.uint8):
            continue
        for views, bounds, user in _uses(inputs[f"feed:{feed.name}"], ()):
            low, high, ignored = bounds
            key = (position, tuple((node.target, node.args[1:]) for node in views), bounds)
            if str(key) not in found:  # the backward pass asks for the same again
                found[str(key)] = Range(position, feed.name, views, low, high, ignored, describe(user))
    return tuple(found.values())


def check_ranges(ranges: Sequence[Range], batches: Sequence[Sequence[Tensor]]) -> None:
    """Compare batches of one shape with the ranges.

    Feeds that are on a GPU already are left out, since reading them would wait for it.

    Raises: FeedError naming the value, the range and the operator.
    """
    for wanted in ranges:
        found = [_through(wanted.views, b[wanted.feed]) for b in batches if b and b[wanted.feed].device.type == "cpu"]
        if found and found[0].numel():
            _check(wanted, found[0] if len(found) == 1 else torch.stack(found))


def _check(wanted: Range, values: Tensor) -> None:
    smallest, largest = (int(end) for end in torch.aminmax(values))
    if smallest >= wanted.low and largest <= wanted.high:
        return
    wrong = (values < wanted.low) | (values > wanted.high)
    if wanted.ignored is not None:
        wrong &= values != wanted.ignored
    if not bool(wrong.any()):
        return
    first = wrong.nonzero()[0].tolist()
    besides = "" if wanted.ignored is None else f" (or {wanted.ignored}, which it ignores)"
    raise FeedError(
        f"feed {wanted.name!r} holds {int(values[tuple(first)])}, but expected are labels or indices from {wanted.low} "
        f"to {wanted.high}{besides}: {int(wrong.sum())} of {values.numel()} values are out of range.\n"
        f"  They are used by {wanted.user}.\n"
        "  What to do: number them from 0, or make the layer that they choose from as large as there are numbers."
    )


def _through(views: Sequence[Node], value: Tensor) -> Tensor:
    for node in views:
        if node.target in _RESHAPES:  # a copy that came before it in the graph was left out
            value = value.reshape(node.args[1])  # type: ignore[arg-type]
        else:
            value = node.target(value, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return value


def _uses(node: Node, views: tuple[Node, ...]) -> Iterator[tuple[tuple[Node, ...], tuple[int, int, int | None], Node]]:
    """Where the values of `node` are looked up, through operators that change none of them."""
    for user in node.users:
        bounds = _bounds(user, node)
        if bounds is not None:
            yield views, bounds, user
        elif len(user.all_input_nodes) == 1 and user.args and user.args[0] is node:
            if user.target in _SAME_VALUES:
                yield from _uses(user, views)
            elif isinstance(user.target, OpOverload) and (user.target.is_view or user.target in _RESHAPES):
                yield from _uses(user, (*views, user))


def _bounds(user: Node, index: Node) -> tuple[int, int, int | None] | None:
    """The smallest and the largest number that `user` takes in `index`, and one that it ignores."""
    args: tuple[Any, ...] = user.args
    if user.target in _NLL and args[1] is index:
        scores = _shape(args[0])
        ignored = args[_IGNORED_ARGUMENT] if len(args) > _IGNORED_ARGUMENT else None
        return 0, scores[1 if len(scores) > 1 else 0] - 1, ignored
    if user.target is checked_index and args[0] is index:
        return args[1], args[2], args[3]
    if user.target is aten.embedding.default and args[1] is index:
        return 0, _shape(args[0])[0] - 1, None
    if user.target in _BY_DIMENSION and args[2] is index and _shape(args[0]):
        return 0, _shape(args[0])[args[1]] - 1, None
    if user.target in _BY_LIST and index in args[1] and index is not args[0]:
        size = _shape(args[0])[args[1].index(index)]
        return -size, size - 1, None
    return None


def _shape(node: Node) -> tuple[int, ...]:
    spec = spec_of(node)
    return tuple(spec.shape) if spec is not None else ()
