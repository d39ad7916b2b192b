"""Where blocks lie after operators that move no elements, and where they lay before."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from millrace.graph.passes.splitting.values import Along

aten = torch.ops.aten

RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
PERMUTATIONS = {aten.t.default, aten.transpose.int, aten.permute.default}


def order_of(node: Node) -> list[int]:
    """For each dimension of a permutation's result, the dimension of its argument."""
    source: Any = node.args[0]
    dims = list(range(source.meta["val"].ndim))
    if node.target is aten.permute.default:
        order: Any = node.args[1]
        return [int(d) % len(dims) for d in order]
    pair: Sequence[Any] = node.args[1:] if node.target is aten.transpose.int else (0, len(dims) - 1)
    one, other = (int(d) % max(len(dims), 1) for d in pair) if dims else (0, 0)
    if dims:
        dims[one], dims[other] = dims[other], dims[one]
    return dims


def before_permutation(node: Node, after: Along) -> Along:
    """Where the blocks of a permutation's result lie in its argument."""
    return after.moved(order_of(node)[after.dim])


def after_permutation(node: Node, before: Along) -> Along:
    """Where the blocks of a permutation's argument lie in its result."""
    return before.moved(order_of(node).index(before.dim))


def reshaped(old: Sequence[int], new: Sequence[int], along: Along) -> Along | None:
    """Where blocks of a tensor of shape `old` lie when it is viewed as `new`; None where they are in no one piece.

    They stay in one piece when the dimension is the outermost of those that are merged or taken apart together, and
    every bound falls on the outermost of the new ones.
    """
    if 0 in old or 0 in new:
        return None
    for olds, news in _groups(old, new):
        if along.dim not in olds:
            continue
        if any(old[d] != 1 for d in olds if d < along.dim):
            return None
        outer = next((d for d in news if new[d] != 1), None)
        if outer is None:
            return None
        inner_old = _product(old[d] for d in olds if d > along.dim)
        inner_new = _product(new[d] for d in news if d > outer)
        if any(bound * inner_old % inner_new for bound in along.bounds):
            return None
        return Along(outer, tuple(bound * inner_old // inner_new for bound in along.bounds))
    return None


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of dimensions of the same number of elements in both shapes."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        olds, news = [i] if i < len(old) else [], [j] if j < len(new) else []
        i, j = i + len(olds), j + len(news)
        while (a := _product(old[d] for d in olds)) != (b := _product(new[d] for d in news)):
            if a < b:
                olds.append(i)
                i += 1
            else:
                news.append(j)
                j += 1
        groups.append((olds, news))
    return groups


def _product(numbers: Any) -> int:
    return list(itertools.accumulate(numbers, lambda a, b: a * b, initial=1))[-1]
