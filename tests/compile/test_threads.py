"""Threads: small steps run on one, and a compilation in the background gets a core while it lasts."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from tests.compile.steps import BATCH, Said, fresh, step_graph
from torch import nn

from millrace.compile import threads
from millrace.compile.threads import core_is_free, is_small, lend_core, one_thread, take_back_core, threads_for
from millrace.compile.tiered import Runner
from millrace.errors import CompileError
from millrace.graph.graph import Graph
from millrace.graph.training import training_graph


@pytest.fixture(autouse=True)
def _all_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Training on every core, of which there are three."""
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(threads, "_borrowers", 0)  # a compilation of another test may still run
    monkeypatch.setattr(threads, "_lent", 0)
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def _graph(module: nn.Module, *shape: int) -> Graph:
    return training_graph(
        module, lambda m, x: m(x).square().mean(), torch.optim.SGD(module.parameters(), lr=0.1), torch.randn(*shape)
    )


@pytest.mark.parametrize(
    ("module", "shape", "small"),
    [
        (nn.Linear(64, 128), (64, 64), True),
        (nn.Linear(160, 160), (160, 160), False),  # 8 million operations in tensors of 25,600 elements
        (nn.ReLU(), (200, 200), None),
        (nn.Conv2d(3, 8, 3), (4, 3, 8, 8), True),
        (nn.Conv2d(64, 64, 3, padding=1), (1, 64, 8, 8), False),
    ],
    ids=["small product", "large product", "many elements", "small convolution", "large convolution"],
)
def test_what_is_small(module: nn.Module, shape: tuple[int, ...], small: bool | None) -> None:
    if small is None:  # nothing to train in it, so together with something that is
        module, small = nn.Sequential(module, nn.Linear(200, 1)), False
    assert is_small(_graph(module, *shape)) is small


def test_a_small_step_runs_on_one_thread_and_others_keep_theirs() -> None:
    graph = step_graph()
    assert is_small(graph)
    seen: list[int] = []
    runner = Runner(graph, "eager", Said().append)
    run = runner._run
    runner._run = lambda variables, feeds: seen.append(torch.get_num_threads()) or run(variables, feeds)  # type: ignore[func-returns-value]
    runner(fresh(graph), BATCH)
    assert seen == [1]
    assert torch.get_num_threads() == 3


def test_the_number_of_threads_is_given_back_after_an_error() -> None:
    def fail() -> None:
        with one_thread():
            seen.append(torch.get_num_threads())
            raise ZeroDivisionError

    seen: list[int] = []
    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [1]
    assert torch.get_num_threads() == 3


def test_a_core_is_lent_once_however_many_compile_and_kernels_are_made_for_all() -> None:
    graph = _graph(nn.Linear(160, 160), 160, 160)
    lend_core()
    lend_core()
    assert torch.get_num_threads() == 2
    assert threads_for(graph) == 3
    core_is_free()
    take_back_core()
    assert torch.get_num_threads() == 2
    core_is_free()
    take_back_core()
    assert torch.get_num_threads() == 3
    assert threads_for(graph) == 3


@pytest.mark.parametrize("count", [1, 2])
def test_no_core_is_lent_when_there_is_one_free_or_only_one(count: int) -> None:
    torch.set_num_threads(count)
    lend_core()
    assert torch.get_num_threads() == count
    take_back_core()
    assert torch.get_num_threads() == count


class _Waiting:
    """A compilation that ends when the test says so."""

    def __init__(self, graph: Graph) -> None:
        self.result: CompileError | None = None
        lend_core()

    def cancel(self) -> None:
        core_is_free()


def test_any_call_takes_the_core_back_when_the_compilation_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millrace.compile.tiered.BackgroundCompilation", _Waiting)
    graph = step_graph()
    runner, other = Runner(graph, "tiered", Said().append), Runner(graph, "eager", Said().append)
    variables = fresh(graph)
    seen = []
    for _ in range(3):
        runner(variables, BATCH)
        seen.append(torch.get_num_threads())
    assert seen == [3, 2, 2]
    del runner  # cancels it
    gc.collect()
    other(variables, BATCH)
    assert torch.get_num_threads() == 3
