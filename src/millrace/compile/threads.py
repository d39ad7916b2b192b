"""How many threads a graph runs on, and who has them while it is compiled.

A step of small tensors is slower on several threads: they meet after every operator, and where another process wants
one of their cores, each meeting waits for the scheduler.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import Node

from millrace.graph.flops import node_flops
from millrace.graph.graph import Graph

_GRAIN_ELEMENTS = 32768  # below which PyTorch's own kernels do not divide a tensor
_GRAIN_FLOPS = 4e6  # what one core does in some 50 microseconds
_lock = threading.Lock()
_compilations = 0  # how many run in the background now


def is_small(graph: Graph) -> bool:
    """Whether one thread is enough: no node of the graph is worth dividing."""
    return all(_is_small(node) for node in graph.nodes)


def threads_for(graph: Graph) -> int:
    """How many threads the kernels of `graph` are made for, from the setting of the thread that calls this."""
    return 1 if is_small(graph) else torch.get_num_threads()


@contextlib.contextmanager
def at_most(threads: int) -> Iterator[None]:
    """PyTorch on no more than so many threads within this context."""
    before = torch.get_num_threads()
    if before <= threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def free_threads() -> int:
    """How many threads a step may use now.

    A compiler in the background gets a core of its own, where training would have them all: threads that meet would
    wait for the one it takes.
    """
    threads = torch.get_num_threads()
    everything = threads >= len(os.sched_getaffinity(0))
    return threads - 1 if _compilations and everything and threads > 1 else threads


def compilation_begins() -> None:
    """Count a compilation that runs beside training."""
    global _compilations
    with _lock:
        _compilations += 1


def compilation_ends() -> None:
    """The end of it, said by whichever thread sees it."""
    global _compilations
    with _lock:
        _compilations -= 1


def _is_small(node: Node) -> bool:
    value = node.meta.get("val")
    arguments = [n.meta.get("val") for n in node.all_input_nodes]
    tensors = [t for t in pytree.tree_leaves([value, arguments]) if isinstance(t, Tensor)]
    if any(t.numel() >= _GRAIN_ELEMENTS for t in tensors):
        return False
    return node_flops(node) < _GRAIN_FLOPS
