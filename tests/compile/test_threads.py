"""Threads: small steps run on one, and a compilation in the background gets a core while it lasts."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.fx.traceback as fx_traceback
from tests.compile.steps import BATCH, Said, fresh, step_graph
from torch import Tensor, nn

from millrace import fit
from millrace.compile import inductor, threads
from millrace.compile.eager import compile_eager
from millrace.compile.threads import at_most, compilation_begins, compilation_ends, free_threads, is_small
from millrace.compile.tiered import Runner
from millrace.errors import CompileError
from millrace.graph.graph import Graph, info
from millrace.graph.training import training_graph
from millrace.optim import sgd


@pytest.fixture(autouse=True)
def _all_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Training on every core, of which there are three."""
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(threads, "_compilations", 0)  # one of another test may still run
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
        with at_most(1):
            seen.append(torch.get_num_threads())
            raise ZeroDivisionError

    seen: list[int] = []
    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [1]
    assert torch.get_num_threads() == 3


def test_never_more_threads_than_there_were() -> None:
    with at_most(5):
        assert torch.get_num_threads() == 3


@pytest.mark.parametrize(("threads", "left"), [(1, 1), (2, 2), (3, 2)])
def test_a_core_is_left_once_however_many_compile_if_none_is_free(threads: int, left: int) -> None:
    torch.set_num_threads(threads)
    compilation_begins()
    compilation_begins()
    assert free_threads() == left
    compilation_ends()
    assert free_threads() == left
    compilation_ends()
    assert free_threads() == threads


class _Waiting:
    """A compilation that ends when it is cancelled."""

    def __init__(self, graph: Graph) -> None:
        self.result: CompileError | None = None
        compilation_begins()

    def cancel(self) -> None:
        compilation_ends()


def test_steps_leave_a_core_while_something_compiles_and_outside_of_them_nothing_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("millrace.compile.tiered.BackgroundCompilation", _Waiting)
    graph = _graph(nn.Linear(160, 160), 160, 160)
    runner, other = Runner(graph, "tiered", Said().append), Runner(graph, "eager", Said().append)
    seen: list[int] = []

    def take(runner: Runner) -> None:
        run = compile_eager(graph)
        runner._run = lambda variables, feeds: seen.append(torch.get_num_threads()) or run(variables, feeds)  # type: ignore[func-returns-value]
        runner(fresh(graph), [torch.randn(160, 160)])
        assert torch.get_num_threads() == 3

    for each in (runner, runner, runner, other):
        take(each)
    assert seen == [3, 2, 2, 2]
    del runner, each  # cancels it
    gc.collect()
    take(other)
    assert seen[-1] == 3


def test_fit_leaves_the_number_of_threads_as_it_was() -> None:
    """Also when the compiler, which was given a core, is still at work."""
    model = nn.Linear(160, 160)
    fit(
        model,
        [torch.randn(160, 160)] * 4,
        loss=lambda m, x: m(x).square().mean(),
        optimizer=sgd(0.1),
        epochs=1,
        progress=False,
        run_dir=False,
    )
    assert torch.get_num_threads() == 3


def test_a_step_can_be_traced_while_another_thread_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch marks the nodes that it traces by variables of the process, and Inductor traces, too."""
    begun, end, marks_are_on = threading.Event(), threading.Event(), threading.Event()

    def compile_module(*_: object) -> None:
        with fx_traceback.preserve_node_meta():
            begun.set()
            end.wait(1.0)
        marks_are_on.set()
        raise CompileError("enough")

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        end.set()
        marks_are_on.wait(10.0)
        return model(batch).square().mean()

    monkeypatch.setattr(inductor, "_load", lambda _: None)  # nothing is in the cache
    monkeypatch.setattr(inductor, "compile_module", compile_module)
    model = nn.Sequential(nn.Linear(4, 4))
    compiling = threading.Thread(target=Runner, args=(step_graph(), "inductor", Said().append))
    compiling.start()
    assert begun.wait(60.0)
    graph = training_graph(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(2, 4))
    compiling.join()
    assert {info(node).scope for node in graph.nodes} >= {"0"}
