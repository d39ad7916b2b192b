"""A graph in segments that run one after the other: the bits of the whole, and each stage as early as can be."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping

import pytest
import torch
from tests.graph.step_models import MODELS, SIZE, batch_of, step_graph
from torch import Tensor

from millrace.graph.check import check
from millrace.graph.graph import Graph
from millrace.graph.passes.extract import ancestors
from millrace.graph.passes.halves import halves
from millrace.graph.passes.splitting.split import split
from millrace.partition.in_turn import in_turn
from millrace.replicas.staged_program import StagedProgram
from millrace.runtime.session import Session


@functools.cache
def gradients_of(model: str, partitions: int = 1) -> Graph:
    """The half that makes gradients, with what it changes among its fetches."""
    half = halves(split(step_graph(model, "adamw"), partitions)).gradients
    news = {f"new/{name}": node for name, node in half.updates.items()}
    return half.with_(fetches={**half.fetches, **news}, updates={})


def stages_of(names: list[str], seed: int) -> tuple[tuple[str, ...], ...]:
    """Some of the names, in an order of their own, in up to five stages, of which some may be empty."""
    choices = random.Random(seed)
    chosen = choices.sample(names, choices.randint(0, len(names)))
    ends = sorted(choices.randint(0, len(chosen)) for _ in range(choices.randint(0, 4)))
    return tuple(tuple(chosen[a:b]) for a, b in zip([0, *ends], [*ends, len(chosen)], strict=True))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("partitions", [1, 2])
def test_segment_after_segment_gives_the_bits_of_the_whole(model: str, partitions: int) -> None:
    graph = gradients_of(model, partitions)
    variables = {name: value.detach().clone() for name, value in graph.initial.items()}
    batch = batch_of(MODELS[model][1], SIZE, 3)
    feeds = {feed.name: tensor for feed, tensor in zip(graph.feeds, batch, strict=True)}
    names = list(graph.fetches)
    whole = dict(zip(names, Session(graph, variables, compile="eager").run(names, feeds), strict=True))
    before = {name: value.clone() for name, value in variables.items()}
    for seed in range(6):
        stages = stages_of(names, seed)
        for segment in in_turn(graph, stages).program.segments:
            check(segment.graph)
        told: list[tuple[str, ...]] = []

        def early(values: Mapping[str, Tensor], told: list[tuple[str, ...]] = told) -> None:
            told.append(tuple(values))
            assert all(torch.equal(values[name], whole[name]) for name in values)

        program = StagedProgram(graph, stages, variables, compile="eager", say=print)
        found = program.run(feeds, early)
        assert told == list(stages)
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], whole[name]) for name in names)
        assert all(torch.equal(variables[name], value) for name, value in before.items())


@pytest.mark.parametrize("model", ["mlp", "cnn", "transformer"])
def test_nothing_runs_before_a_stage_that_it_does_not_need(model: str) -> None:
    graph = gradients_of(model)
    made = [name for name in graph.fetches if name.startswith("gradient/")]
    stages = [[name] for name in reversed(made)]
    cut = in_turn(graph, stages)
    assert list(cut.ready) == sorted(cut.ready)
    ran: set[str] = set()
    for index, segment in enumerate(cut.program.segments[: cut.ready[-1] + 1]):
        ran |= {node.name for node in segment.graph.nodes}
        done = [name for stage, ready in zip(stages, cut.ready, strict=True) for name in stage if ready <= index]
        needed = {node.name for node in ancestors([graph.node(graph.fetches[name]) for name in done])}
        beside = {n.name for n in graph.nodes if n.all_input_nodes and n.all_input_nodes[0].name in needed}
        assert ran <= needed | beside  # several results of one operator
    assert {node.name for node in graph.nodes} - ran  # the loss that is fetched, for one
