"""Workers that train alone for some steps and then take an outer step together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.graph.step_models import MODELS, batch_of, step_graph
from tests.replicas.real_session import session_over
from torch import Tensor

from millrace.graph.graph import TRAIN, Graph
from millrace.graph.signature import Role
from millrace.replicas.local_replica import LocalReplica
from millrace.replicas.replica import Computed, Slice
from millrace.replicas.settings import LocalSteps
from millrace.runtime.session import Session

SIZE = 6


def local_replica(graph: Graph, rule: LocalSteps) -> LocalReplica:
    variables = {name: value.detach().clone() for name, value in graph.initial.items()}
    made = LocalReplica(graph, variables, rule, compile="eager", say=lambda _: None)
    made.load(0, graph)
    return made


def slices_of(kind: str, workers: int, every: int, seed: int) -> list[Slice]:
    """Slices whose numbers are their workers', of SIZE examples each."""
    batches = [batch_of(kind, SIZE * workers, seed * every + step) for step in range(every)]
    return [
        Slice(
            n,
            0,
            1 / workers,
            tuple({str(i): t[n * SIZE : (n + 1) * SIZE] for i, t in enumerate(batch)} for batch in batches),
        )
        for n in range(workers)
    ]


def outer_step(workers: list[LocalReplica], found: list[Computed]) -> None:
    means = {name: torch.stack([one.means[name] for one in found]).sum(0) for name in found[0].means}
    for worker, one in zip(workers, found, strict=True):
        worker.commit({name: value.clone() for name, value in means.items()}, one.others)


def test_two_rounds_are_what_the_algorithm_says() -> None:
    """Local AdamW, then Nesterov's step on the mean change: written out here with sessions."""
    graph, rule, count = step_graph("mlp", "adamw"), LocalSteps(every=3, learning_rate=0.7, momentum=0.9), 2
    workers = [local_replica(graph, rule) for _ in range(count)]
    sessions = [Session(graph, copy=True, compile="eager") for _ in range(count)]
    trained = [v.name for v in graph.variables if v.role is Role.PARAMETER]
    outer = {name: graph.initial[name].detach().clone() for name in trained}
    moments = {name: torch.zeros_like(value) for name, value in outer.items()}
    for turn in range(2):
        slices = slices_of("numbers", count, rule.every, turn)
        outer_step(workers, [worker.compute([one]) for worker, one in zip(workers, slices, strict=True)])
        for session, one in zip(sessions, slices, strict=True):
            for name in trained:
                session.assign(name, outer[name])
            for batch in one.batches:
                session.run([TRAIN], (batch["0"], batch["1"]))
        for name in trained:
            change = sum((outer[name] - session.read(name) for session in sessions), torch.zeros(())) / count
            moments[name] = 0.9 * moments[name] + change
            outer[name] = outer[name] - 0.7 * (change + 0.9 * moments[name])
    for worker in workers:
        for name in trained:
            torch.testing.assert_close(worker.variables[name], outer[name], rtol=1e-9, atol=1e-9)


def test_averaging_after_every_step_of_sgd_is_the_step_of_the_whole_batch() -> None:
    graph, rule = step_graph("mlp", "sgd"), LocalSteps(every=1, learning_rate=1.0, momentum=0.0)
    workers = [local_replica(graph, rule) for _ in range(3)]
    whole = Session(graph, copy=True, compile="eager", warn_new_shape=False)
    for turn in range(3):
        slices = slices_of("numbers", 3, 1, turn)
        outer_step(workers, [worker.compute([one]) for worker, one in zip(workers, slices, strict=True)])
        whole.run([TRAIN], batch_of("numbers", 3 * SIZE, turn))
    for name, value in whole.variables.items():
        torch.testing.assert_close(workers[1].variables[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model", ["cnn", "transformer with dropout"])
def test_computing_changes_nothing_that_a_repeated_step_would_see(model: str) -> None:
    graph, kind = step_graph(model, "adamw"), MODELS[model][1]
    worker = local_replica(graph, LocalSteps(every=2))
    before = {name: value.clone() for name, value in worker.variables.items()}
    slices = slices_of(kind, 2, 2, 0)
    first = {name: value.clone() for name, value in worker.compute(slices[1:]).means.items()}
    assert all(torch.equal(worker.variables[name], value) for name, value in before.items())
    again: dict[str, Tensor] = dict(worker.compute(slices[1:]).means)
    assert all(torch.equal(again[name], value) for name, value in first.items())


def test_one_worker_that_has_all_slices_is_as_good_as_several() -> None:
    graph, rule = step_graph("mlp", "sgd"), LocalSteps(every=2)
    both, alone = [local_replica(graph, rule) for _ in range(2)], local_replica(graph, rule)
    for turn in range(2):
        slices = slices_of("numbers", 2, 2, turn)
        outer_step(both, [worker.compute([one]) for worker, one in zip(both, slices, strict=True)])
        outer_step([alone], [alone.compute(slices)])
    for name, value in both[0].variables.items():
        torch.testing.assert_close(alone.variables[name], value, rtol=1e-9, atol=1e-9)


def test_a_slice_without_weight_counts_steps_and_moves_nothing() -> None:
    """A worker that has no examples of its own trains on another's, so that its counters stay those of all."""
    graph, rule = step_graph("dropout", "adamw"), LocalSteps(every=2)
    busy, idle = local_replica(graph, rule), local_replica(graph, rule)
    (one,) = slices_of("numbers", 1, 2, 0)
    outer_step([busy, idle], [busy.compute([one]), idle.compute([replace(one, number=1, weight=0.0)])])
    for variable in graph.variables:
        name, ours, theirs = variable.name, idle.variables[variable.name], busy.variables[variable.name]
        if variable.role in (Role.PARAMETER, Role.RANDOM) or not ours.dim():
            assert torch.equal(ours, theirs), name
    steps = [name for name in idle.variables if name.endswith("/step")]
    assert steps
    assert all(float(idle.variables[name]) == 2 for name in steps)


def test_idle_replicas_are_given_what_another_has() -> None:
    graph = step_graph("mlp", "adamw")
    with session_over(graph, LocalSteps(every=2), 2) as session:
        (losses,) = session.run_steps(["loss", TRAIN], [batch_of("numbers", 1, step) for step in range(2)])[:1]
        assert losses.shape == (2,)
        busy, idle = session._slices
        assert idle.batches == busy.batches
