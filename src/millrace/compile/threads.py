"""How many threads a graph runs on, and who has them while it is compiled.

A step of small tensors is slower on several threads: they meet after every operator, and where another process wants
one of their cores, each meeting waits for the scheduler.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Iterator

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import Node
from torch.utils.flop_counter import flop_registry

from millrace.graph.graph import Graph

_GRAIN_ELEMENTS = 32768  # below which PyTorch's own kernels do not divide a tensor
_GRAIN_FLOPS = 4e6  # what one core does in some 50 microseconds
_lock = threading.Lock()
_lent = 0  # cores that training leaves to the compiler now
_borrowers = 0


def is_small(graph: Graph) -> bool:
    """Whether one thread is enough: no node of the graph is worth dividing."""
    return all(_is_small(node) for node in graph.nodes)


def threads_for(graph: Graph) -> int:
    """How many threads the kernels of `graph` are made for, whoever has a core of them now."""
    return 1 if is_small(graph) else torch.get_num_threads() + _lent


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread within this context."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def lend_core() -> None:
    """Leave a core to a compiler, if training has them all: threads that meet would wait for the one it takes."""
    global _lent, _borrowers
    with _lock:
        _borrowers += 1
        threads = torch.get_num_threads()
        if _borrowers == 1 and threads > 1 and threads >= len(os.sched_getaffinity(0)):
            torch.set_num_threads(threads - 1)
            _lent = 1


def core_is_free() -> None:
    """The end of a `lend_core`, said by whichever thread sees it."""
    global _borrowers
    with _lock:
        _borrowers -= 1


def take_back_core() -> None:
    """Give training its core again once nobody compiles. For the thread that trains, whose setting it is."""
    global _lent
    if _lent and not _borrowers:
        with _lock:
            torch.set_num_threads(torch.get_num_threads() + _lent)
            _lent = 0


def _is_small(node: Node) -> bool:
    value = node.meta.get("val")
    arguments = [n.meta.get("val") for n in node.all_input_nodes]
    tensors = [t for t in pytree.tree_leaves([value, arguments]) if isinstance(t, Tensor)]
    if any(t.numel() >= _GRAIN_ELEMENTS for t in tensors):
        return False
    return _flops(node, value) < _GRAIN_FLOPS


def _flops(node: Node, value: object) -> float:
    """Of a matrix product, a convolution or attention; 0 for what does a few operations per element."""
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
    if formula is None:
        return 0.0
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    try:
        return float(formula(*args, **kwargs, out_val=value))
    except (TypeError, ValueError, AttributeError, AssertionError):  # a formula for other arguments than these
        return math.inf
