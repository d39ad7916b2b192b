"""What one replica does on its GPU, in a process that has the stand-in; `tests/replicas/test_gpus.py` runs them."""

from __future__ import annotations

import pytest
import torch
from tests.graph.step_models import MODELS, batch_of, step_graph
from tests.replicas import stand_in
from tests.replicas.test_replica import SIZES, added, replica_of, sliced

from millrace.graph.passes.halves import halves
from millrace.replicas.gpu_programs import GpuPrograms
from millrace.replicas.local_replica import LocalReplica
from millrace.replicas.replica import Gradients, Replica
from millrace.replicas.settings import LocalSteps
from millrace.replicas.stages import early_stages


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [("mlp", "adamw"), ("lstm", "millrace adam clipped"), ("tied", "adamw"), ("cnn", "momentum")],
)
def test_a_replica_has_all_on_its_gpu_and_takes_the_same_step(model: str, optimizer: str) -> None:
    gpu = stand_in.use()
    graph, kind = step_graph(model, optimizer), MODELS[model][1]
    here = replica_of(graph, SIZES, kind)
    cut = halves(graph)
    stages = early_stages(cut.gradients, [feed.name for feed in cut.exchanged])
    there = {name: value.detach().clone().to(gpu) for name, value in graph.initial.items()}
    replica = Replica(cut.update, there, compile="eager", say=print, stages=stages, gpu=gpu)
    assert graph.retrace is not None
    for size in set(SIZES):
        replica.load(size, halves(graph.retrace(batch_of(kind, size))).gradients)
    for seed in range(2):
        batch, begun = batch_of(kind, sum(SIZES), seed), []
        expected = here.compute(sliced(batch, SIZES))
        here.commit(added([expected]), expected.others)
        found = replica.compute(sliced(batch, SIZES), begun.extend)
        assert len(begun) >= found.begun
        assert found.begun == len(stages)
        assert {t.device for t in [*begun, *found.means.values(), *found.others.values()]} == {gpu}
        replica.commit(added([found]), found.others)
    for name, value in here.variables.items():
        assert replica.variables[name].device == gpu
        torch.testing.assert_close(replica.variables[name].cpu(), value, rtol=1e-9, atol=1e-9)


def test_slices_without_examples_add_nothing_there() -> None:
    gpu, graph = stand_in.use(), step_graph("mlp", "adamw")
    there = {name: value.detach().clone().to(gpu) for name, value in graph.initial.items()}
    replica = Replica(halves(graph).update, there, compile="eager", say=print, gpu=gpu)
    replica.load(6, halves(graph).gradients)
    full = sliced(batch_of(MODELS["mlp"][1], 6), [6])
    both = replica.compute([*full, type(full[0])(1, 6, 0.0, ())]).means
    for name, value in replica.compute(full).means.items():
        assert torch.equal(both[name].cpu(), value.cpu())


def test_local_steps_are_taken_on_the_gpu() -> None:
    gpu, graph = stand_in.use(), step_graph("mlp", "adamw")
    kind, rule = MODELS["mlp"][1], LocalSteps(every=2)
    values = {name: value.detach().clone() for name, value in graph.initial.items()}
    here = LocalReplica(graph, {n: v.clone() for n, v in values.items()}, rule, compile="eager", say=print)
    there = LocalReplica(graph, {n: v.to(gpu) for n, v in values.items()}, rule, compile="eager", say=print, gpu=gpu)
    batches = tuple(sliced(batch_of(kind, 6, seed), [6])[0].batches[0] for seed in range(2))
    part = sliced(batch_of(kind, 6), [6])[0]
    for replica in (here, there):
        replica.load(6, graph)
        found = replica.compute([type(part)(0, 6, 1.0, batches)])
        replica.commit(found.means, found.others)
    for name, value in here.variables.items():
        assert there.variables[name].device == gpu
        torch.testing.assert_close(there.variables[name].cpu(), value, rtol=1e-9, atol=1e-9)


def test_gradients_of_variables_in_host_memory_come_back_there() -> None:
    gpu, graph = stand_in.use(), step_graph("lstm", "adamw")
    kind, cut = MODELS["lstm"][1], halves(graph)
    values = {name: value.detach().clone() for name, value in graph.initial.items()}
    names = [feed.name for feed in cut.exchanged]
    programs = GpuPrograms(gpu, compile="eager", say=print)
    here = Gradients(names, values, compile="eager", say=print)
    there = Gradients(names, values, compile="eager", say=print, elsewhere=programs)
    for gradients in (here, there):
        gradients.load(0, cut.gradients)
    for seed in range(2):
        feeds = sliced(batch_of(kind, 6, seed), [6])[0].batches[0]
        expected, found = (gradients.values(1, 0, feeds) for gradients in (here, there))  # random numbers of slice 1
        for name, value in expected.items():
            assert found[name].device.type == "cpu"
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)
        for value in values.values():  # what servers do
            if value.is_floating_point():
                value.mul_(0.5)
        for gradients in (here, there):
            gradients.use(values)
