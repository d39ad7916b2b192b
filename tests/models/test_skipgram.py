"""Skip-gram's two objectives against loops over pairs, and updates of rows that stay rows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from millrace.data.skipgram import noise_chances
from millrace.graph.graph import Graph
from millrace.graph.passes.prune import prune
from millrace.graph.passes.sparse_rows import sparse_rows
from millrace.graph.training import training_graph
from millrace.models.skipgram import SkipGram, negative_sampling, pairs, sampled_softmax
from millrace.optim import sgd

COUNTS = [50, 30, 20, 9, 5, 4, 2]
BLOCKS, LENGTH, NOISE = 3, 6, 4


def model() -> SkipGram:
    torch.manual_seed(0)
    found = SkipGram(COUNTS, width=5).double()
    torch.nn.init.normal_(found.words.weight)
    torch.nn.init.normal_(found.contexts.weight)
    return found


def batch(seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "words": torch.randint(len(COUNTS), (BLOCKS, LENGTH), generator=generator),
        "sentences": torch.tensor([[0, 0, 0, 0, 1, 1]] * BLOCKS),
        "windows": torch.randint(1, 4, (BLOCKS, LENGTH), generator=generator),
        "noise": torch.randint(len(COUNTS), (BLOCKS, NOISE), generator=generator),
    }


def listed(given: dict[str, Tensor]) -> Iterator[tuple[int, int, int]]:
    """Every (block, place of a word, place of its context), by the definition."""
    for block in range(BLOCKS):
        for i in range(LENGTH):
            for j in range(LENGTH):
                near = 0 < abs(i - j) <= given["windows"][block, i]
                if near and given["sentences"][block, i] == given["sentences"][block, j]:
                    yield block, i, j


def score(net: SkipGram, word: Tensor, context: Tensor) -> float:
    return float((net.words.weight[word] @ net.contexts.weight[context]).detach())


def test_pairs_are_within_the_window_and_the_sentence() -> None:
    given = batch()
    assert {tuple(pair) for pair in pairs(given).nonzero().tolist()} == set(listed(given))


def test_negative_sampling_is_the_papers() -> None:
    net, given, negatives = model(), batch(), 5.0
    total = 0.0
    for block, i, j in listed(given):
        word, context = given["words"][block, i], given["words"][block, j]
        total += math.log1p(math.exp(-score(net, word, context)))
        noise = [math.log1p(math.exp(score(net, word, n))) for n in given["noise"][block]]
        total += negatives * sum(noise) / len(noise)
    assert float(negative_sampling(net, given, negatives).detach()) == pytest.approx(total / (BLOCKS * LENGTH))


def test_sampled_softmax_is_cross_entropy_over_a_context_and_noise() -> None:
    net, given = model(), batch()
    log_chance = torch.from_numpy(noise_chances(COUNTS)).log()
    total = 0.0
    for block, i, j in listed(given):
        word = given["words"][block, i]
        among = torch.cat([given["words"][block, j, None], given["noise"][block]])
        logits = torch.tensor([score(net, word, n) - float(log_chance[n]) for n in among])
        total -= float(logits.log_softmax(0)[0])
    assert float(sampled_softmax(net, given).detach()) == pytest.approx(total / (BLOCKS * LENGTH), rel=1e-5)


def nodes_as_large_as(graph: Graph, shape: tuple[int, ...]) -> list[str]:
    return [n.name for n in graph.nodes if n.op == "call_function" and tuple(n.meta["val"].shape) == shape]


def test_with_plain_sgd_no_gradient_is_as_large_as_a_table() -> None:
    net = SkipGram(list(range(1000, 0, -1)), width=5)
    graph = training_graph(net, lambda m, b: negative_sampling(m, b, 5.0), sgd(0.1), batch())
    step = prune(graph, ("loss",), graph.updates)
    assert len(nodes_as_large_as(step, (1000, 5))) > 2
    assert len(nodes_as_large_as(sparse_rows(step), (1000, 5))) == 2, "the two updates"
