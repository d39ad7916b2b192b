"""One worker's share of a step: slices computed, means taken, and variables changed only by `commit`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.graph.step_models import MODELS, batch_of, step_graph
from torch import Tensor

from millrace.errors import WorkerError
from millrace.graph.graph import TRAIN, Graph
from millrace.graph.passes.halves import halves
from millrace.graph.random import slice_random
from millrace.graph.save import graph_bytes, graph_from_bytes
from millrace.replicas.replica import Computed, Replica, Slice
from millrace.runtime.session import Session

SIZES = [3, 2, 1]


def replica_of(graph: Graph, sizes: Sequence[int], kind: str) -> Replica:
    """A replica whose programs, which came over a wire, have the numbers of the sizes of their slices."""
    cut = halves(graph)
    variables = {name: tensor.detach().clone() for name, tensor in graph.initial.items()}
    made = Replica(graph_from_bytes(graph_bytes(cut.update)), variables, compile="eager", say=lambda _: None)
    assert graph.retrace is not None
    for size in set(sizes) - {0}:
        part = halves(graph.retrace(batch_of(kind, size))).gradients
        made.load(size, graph_from_bytes(graph_bytes(part)))
    return made


def sliced(batch: Sequence[Tensor], sizes: Sequence[int]) -> list[Slice]:
    parts = [tensor.split([s for s in sizes if s]) for tensor in batch]
    found = []
    for number, size in enumerate(sizes):
        feeds = {str(i): part[number] for i, part in enumerate(parts)} if size else {}
        found.append(Slice(number, size or max(sizes), size / sum(sizes), (feeds,) if size else ()))
    return found


def added(parts: Sequence[Computed]) -> dict[str, Tensor]:
    return {name: torch.stack([part.means[name] for part in parts]).sum(0) for name in parts[0].means}


@pytest.mark.parametrize(
    ("model", "optimizer"), [("mlp", "adamw"), ("lstm", "millrace adam clipped"), ("tied", "adamw")]
)
@pytest.mark.parametrize("shares", [[[0, 1, 2]], pytest.param([[0], [1], [2]], marks=pytest.mark.long), [[0, 2], [1]]])
def test_workers_that_share_the_slices_take_the_step_of_the_whole_batch(
    model: str, optimizer: str, shares: list[list[int]]
) -> None:
    graph, kind = step_graph(model, optimizer), MODELS[model][1]
    whole = Session(graph, copy=True, compile="eager")
    workers = [replica_of(graph, SIZES, kind) for _ in shares]
    for seed in range(3):
        batch = batch_of(kind, sum(SIZES), seed)
        whole.run([TRAIN], batch)
        slices = sliced(batch, SIZES)
        found = [w.compute([slices[i] for i in share]) for w, share in zip(workers, shares, strict=True)]
        means = added(found)
        for worker, one in zip(workers, found, strict=True):
            worker.commit({name: mean.clone() for name, mean in means.items()}, one.others)
    for worker in workers:
        for name, value in whole.variables.items():
            torch.testing.assert_close(worker.variables[name], value, rtol=1e-9, atol=1e-9)


def test_one_replica_is_a_run_without_replicas_bit_for_bit() -> None:
    """Also with BatchNorm's statistics and a stream of random numbers."""
    graph = step_graph("cnn", "momentum")
    whole = Session(graph, copy=True, compile="eager")
    alone = replica_of(graph, [6], "images")
    for seed in range(3):
        batch = batch_of("images", 6, seed)
        expected = whole.run([TRAIN, "loss", "hits"], batch)[1:]
        found = alone.compute(sliced(batch, [6]))
        alone.commit(found.means, found.others)
        assert all(map(torch.equal, expected, (found.fetches[0]["loss"], found.fetches[0]["hits"])))
    assert all(torch.equal(alone.variables[name], value) for name, value in whole.variables.items())


def test_slices_draw_from_streams_of_their_own_and_count_together() -> None:
    graph = step_graph("dropout", "sgd")
    replica = replica_of(graph, [3], "numbers")
    batch = batch_of("numbers", 3)
    before = replica.variables["random"].clone()
    same = [Slice(number, 3, 0.5, ({"0": batch[0], "1": batch[1]},)) for number in (0, 1)]
    found = replica.compute(same)
    assert not torch.equal(found.fetches[0]["loss"], found.fetches[1]["loss"])
    assert torch.equal(replica.variables["random"], before)
    replica.commit(found.means, found.others)
    assert replica.variables["random"].tolist() == [int(before[0]), int(before[1]) + 1]
    assert not torch.equal(slice_random(before, 1), before)


def test_statistics_of_batchnorm_are_averaged_and_the_count_of_batches_is_not() -> None:
    graph = step_graph("cnn", "momentum")
    replica = replica_of(graph, [3], "images")
    slices = sliced(batch_of("images", 6), [3, 3])
    each = []
    for one in slices:
        lone = replica_of(graph, [3], "images")
        found = lone.compute([Slice(one.number, one.key, 1.0, one.batches)])
        lone.commit(found.means, found.others)
        each.append(lone.variables["1.running_mean"])
    found = replica.compute(slices)
    replica.commit(found.means, found.others)
    torch.testing.assert_close(replica.variables["1.running_mean"], (each[0] + each[1]) / 2)
    assert int(replica.variables["1.num_batches_tracked"]) == 1


def test_computing_changes_no_variable_so_that_a_step_can_be_done_again() -> None:
    graph = step_graph("cnn", "adamw")
    replica = replica_of(graph, [6], "images")
    before = {name: value.clone() for name, value in replica.variables.items()}
    slices = sliced(batch_of("images", 6), [6])
    first = replica.compute(slices)
    assert all(torch.equal(replica.variables[name], value) for name, value in before.items())
    kept = {name: value.clone() for name, value in first.means.items()}
    again = replica.compute(slices)
    assert all(torch.equal(again.means[name], value) for name, value in kept.items())


def test_a_slice_without_examples_adds_nothing() -> None:
    graph = step_graph("cnn", "momentum")
    replica = replica_of(graph, [2], "images")
    slices: list[Any] = sliced(batch_of("images", 2), [2, 0])
    full, empty = replica.compute(slices[:1]), replica.compute(slices[1:])
    assert empty.means.keys() == full.means.keys()
    assert not any(value.any() for value in empty.means.values())
    assert empty.fetches == ({},)


def test_a_program_that_was_not_given_is_an_error() -> None:
    replica = replica_of(step_graph("mlp", "sgd"), [2], "numbers")
    with pytest.raises(WorkerError, match="program 7 was not given"):
        replica.compute([Slice(0, 7, 1.0, ({},))])
