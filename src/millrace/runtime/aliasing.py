"""Who shares memory with a variable: a graph is functional, so what it overwrites must be nobody else's."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from itertools import takewhile

import torch
from torch import Tensor

from millrace.errors import FeedError, GraphError
from millrace.graph.graph import Graph


def check_variables(graph: Graph, tensors: Mapping[str, Tensor]) -> None:
    """Whether `tensors` can be the variables of `graph`.

    Raises: FeedError for another shape or dtype than was traced; GraphError when a variable that the step updates
    shares elements with another one, or with itself.
    """
    for variable in graph.variables:
        tensor = tensors[variable.name]
        if not variable.spec.fits(tensor):
            raise FeedError(
                f"variable {variable.name!r} is {variable.spec} in the graph, got {tensor.dtype} {list(tensor.shape)}. "
                "Pass the tensors that the step was traced with, or others of the same shapes and dtypes."
            )
        # Of a tensor that nobody updates, every element may stand for many.
        if variable.name in graph.updates and _overlaps_itself(tensor):
            raise GraphError(
                f"the step updates the variable {variable.name!r}, but several of its elements are one place in memory "
                f"(shape {list(tensor.shape)}, stride {list(tensor.stride())}: an expanded tensor). "
                "Give it memory of its own: .clone()."
            )
    for one, other in _sharing(tensors):
        if one in graph.updates or other in graph.updates:
            raise GraphError(
                f"the variables {one!r} and {other!r} share memory, but are two tensors, and the step updates them: "
                "each update would overwrite the other. Tie them as one tensor (b.weight = a.weight), or give one of "
                "them memory of its own (.clone())."
            )


class Memory:
    """Where tensors lie."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        pieces = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self._starts = sorted(start for start in pieces if start)
        self._ends = [start + pieces[start] for start in self._starts]

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` may share memory with one of them. Quick, since it is asked of every batch."""
        if tensor.layout is not torch.strided:
            return False
        address = tensor.data_ptr()
        before = bisect_right(self._starts, address) - 1
        return before >= 0 and address < self._ends[before]


def _sharing(tensors: Mapping[str, Tensor]) -> Iterable[tuple[str, str]]:
    by_storage: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel() and not tensor.is_meta:
            by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    for names in by_storage.values():
        names.sort(key=lambda name: _range_bytes(tensors[name]))
        for position, one in enumerate(names):
            end = _range_bytes(tensors[one])[1]
            # Sorted by their starts: the first that begins behind the end ends the search.
            for other in takewhile(lambda name: _range_bytes(tensors[name])[0] < end, names[position + 1 :]):  # noqa: B023
                if _overlap(tensors[one], tensors[other]):
                    yield one, other


def _overlaps_itself(tensor: Tensor) -> bool:
    return any(stride == 0 and extent > 1 for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage, whose ranges meet, have an element in common."""
    if one.element_size() != other.element_size():
        return True
    # The ranges of a matrix's columns meet, their elements do not.
    marks = torch.zeros(one.untyped_storage().nbytes() // one.element_size(), dtype=torch.bool)
    marks.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(marks.as_strided(other.shape, other.stride(), other.storage_offset()).any())


def _range_bytes(tensor: Tensor) -> tuple[int, int]:
    """First byte and the byte after the last, in the storage."""
    extent = 1 + sum((int(n) - 1) * int(stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.element_size()
    return start, start + extent * tensor.element_size()
