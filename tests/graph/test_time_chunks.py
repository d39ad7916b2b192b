"""Recurrences in chunks of time compute what they did whole, chunk after chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.graph.programs import run
from torch import Tensor, nn
from torch.fx import Interpreter

from millrace.errors import GraphError
from millrace.graph.check import check
from millrace.graph.graph import Graph, info
from millrace.graph.passes.chunking.builder import CHUNK
from millrace.graph.passes.microbatch import microbatch
from millrace.graph.passes.splitting.split import split
from millrace.graph.passes.time_chunks import time_chunks
from millrace.graph.signature import Phase
from millrace.graph.training import training_graph

WORDS, WIDTH = 11, 4
KERNEL, KERNEL_BACKWARD = "millrace.lstm_layer.default", "millrace.lstm_layer_backward.default"


class Tagger(nn.Module):
    """Words -> recurrent layers -> scores of words, for every step of time."""

    def __init__(self, kind: Any = nn.LSTM, modules: int = 2, dropout: float = 0.0, **options: Any) -> None:
        super().__init__()
        wide = WIDTH * (2 if options.get("bidirectional") else 1)
        out = options.get("proj_size") or wide
        self.batch_first = options.get("batch_first", False)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(kind(WIDTH if i == 0 else out, WIDTH, **options) for i in range(modules))
        self.norm, self.dropout = nn.LayerNorm(out), nn.Dropout(dropout)
        self.scores = nn.Linear(out, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        for layer in self.layers:
            x = self.dropout(layer(x)[0])
        return self.scores(torch.tanh(self.norm(x)))


class Translator(nn.Module):
    """Cells in a Python loop that attends to what an LSTM has read."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.encoder = nn.LSTM(WIDTH, WIDTH)
        self.first, self.second = nn.LSTMCell(WIDTH, WIDTH), nn.LSTMCell(2 * WIDTH, WIDTH)
        self.scores = nn.Linear(WIDTH, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        read, (h, c) = self.encoder(x)
        one = two = (h[0], c[0])
        found = []
        for step in range(len(words)):
            one = self.first(x[step], one)
            weights = torch.softmax((read * one[0]).sum(-1), 0)
            two = self.second(torch.cat([one[0], (weights.unsqueeze(-1) * read).sum(0)], -1), two)
            found.append(self.scores(two[0]))
        return torch.stack(found)


def sentences(steps: int, count: int, batch_first: bool = False, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, WORDS, (count, steps) if batch_first else (steps, count), generator=generator)


def loss(model: nn.Module, batch: Sequence[Tensor]) -> Any:
    scores = model(batch[0])
    return F.cross_entropy(scores.flatten(0, 1), batch[1].flatten(), ignore_index=0), {"scores": scores}


def graph_of(model: nn.Module, words: Tensor) -> Graph:
    return training_graph(
        model, loss, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), (words, words.clone())
    )


class InDouble(Interpreter):
    """Runs a graph of float32 in float64; the kernel, which has no float64, by its equations."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if str(target) == KERNEL:
            return layer_in_double(*args)
        if str(target) == KERNEL_BACKWARD:
            x, weights, h, c, _, gradients, reverse = args
            inputs = [t.detach().requires_grad_() for t in (x, *weights, h, c)]
            with torch.enable_grad():
                results = layer_in_double(*inputs, reverse)[:3]
            return torch.autograd.grad(results, inputs, gradients)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        args = [torch.float64 if a is torch.float32 else a for a in args]
        result = target(*args, **kwargs)
        made = isinstance(result, Tensor) and result.dtype is torch.float32
        return result.double() if made else result


def layer_in_double(
    x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, h: Tensor, c: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = []
    for step in x.flip(0) if reverse else x:
        i, f, g, o = (step @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        found.append(h)
    y = torch.stack(found[::-1] if reverse else found)
    return y, h, c, torch.zeros(1)


def in_double(graph: Graph, feeds: Sequence[Tensor], steps: int) -> list[Tensor]:
    """The fetches of every step, then the variables after them."""
    values = {n: t.detach().double() if t.is_floating_point() else t.clone() for n, t in graph.initial.items()}
    found = []
    for _ in range(steps):
        results = InDouble(graph.module).run(*values.values(), *feeds)
        found += results[: len(graph.fetches)]
        values |= dict(zip(graph.updates, results[len(graph.fetches) :], strict=True))
    return [*found, *values.values()]


def same(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-9) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def kernels(graph: Graph) -> int:
    return sum(str(node.target) == KERNEL for node in graph.nodes)


@pytest.mark.long
@settings(max_examples=10, deadline=None)
@given(
    steps=st.integers(2, 9),
    chunks=st.integers(2, 4),
    modules=st.integers(1, 2),
    inner=st.integers(1, 2),
    batch_first=st.booleans(),
    bidirectional=st.booleans(),
    dropout=st.sampled_from([0.0, 0.4]),
)
def test_training_in_chunks_is_training_on_the_whole(
    steps: int, chunks: int, modules: int, inner: int, batch_first: bool, bidirectional: bool, dropout: float
) -> None:
    torch.manual_seed(0)
    options = {"num_layers": inner, "batch_first": batch_first, "bidirectional": bidirectional}
    words = sentences(steps, 3, batch_first)
    graph = graph_of(Tagger(modules=modules, dropout=dropout, **options), words)
    chunked = check(time_chunks(graph, chunks))
    assert kernels(chunked) == kernels(graph) * (chunks if steps >= chunks else 1)
    same(in_double(chunked, [words, words], 5), in_double(graph, [words, words], 5))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.GRU, {}),
        (nn.RNN, {"batch_first": True, "num_layers": 2}),
        (nn.LSTM, {"num_layers": 2, "modules": 1}),
        (nn.LSTM, {"proj_size": 2, "modules": 1}),
    ],
    ids=str,
)
def test_what_is_written_out_trains_alike(kind: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    words = sentences(5, 3, options.get("batch_first", False))
    graph = graph_of(Tagger(kind, dropout=0.3, **options).double(), words)
    assert kernels(graph) == 0
    chunked = check(time_chunks(graph, 2))
    assert {n.meta.get(CHUNK) for n in chunked.nodes} == {None, 0, 1}
    same(run(chunked, graph.initial, [words, words], steps=5), run(graph, graph.initial, [words, words], steps=5))


def test_the_kernel_itself_gives_the_same_numbers() -> None:
    torch.manual_seed(0)
    words = sentences(7, 3)
    graph = graph_of(Tagger(dropout=0.3, num_layers=2), words)
    chunked = time_chunks(graph, 3)
    same(
        run(chunked, graph.initial, [words, words], steps=5),
        run(graph, graph.initial, [words, words], steps=5),
        tolerance=1e-5,
    )


def test_cells_that_attend_train_alike() -> None:
    torch.manual_seed(0)
    words = sentences(6, 3)
    graph = graph_of(Translator(), words)
    chunked = check(time_chunks(graph, 3))
    assert kernels(chunked) == 3
    same(in_double(chunked, [words, words], 5), in_double(graph, [words, words], 5))


def test_a_layer_waits_for_its_own_chunk_of_the_layer_below() -> None:
    """Chunk 0 of the second layer reads nothing of the later chunks of the first."""
    graph = time_chunks(graph_of(Tagger(dropout=0.3), sentences(8, 3)), 4)
    for phase, reads in ((Phase.FORWARD, range(1)), (Phase.BACKWARD, range(3, 4))):
        name = KERNEL if phase is Phase.FORWARD else KERNEL_BACKWARD
        for node in graph.nodes:
            if str(node.target) == name and node.meta[CHUNK] in reads:
                assert {a.meta[CHUNK] for a in ancestors(node) if info(a).phase is phase and CHUNK in a.meta} <= set(
                    reads
                )


def ancestors(node: Any) -> set[Any]:
    found, waiting = {node}, [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                waiting.append(source)
    return found


def test_every_node_of_a_written_out_step_is_in_the_chunk_of_its_step() -> None:
    """Nothing is read from a later chunk in the forward pass, or from an earlier one in the backward pass."""
    torch.manual_seed(0)
    for model in (Tagger(nn.GRU), Translator()):
        graph = time_chunks(graph_of(model, sentences(6, 3)), 3)
        recurring = [n for n in graph.nodes if CHUNK in n.meta and info(n).scope.split(".")[0] != "encoder"]
        for node in recurring:
            for source in node.all_input_nodes:
                same_phase = info(source).phase is info(node).phase and source in recurring
                if same_phase and info(node).phase is Phase.FORWARD:
                    assert source.meta[CHUNK] <= node.meta[CHUNK]
                elif same_phase:
                    assert source.meta[CHUNK] >= node.meta[CHUNK]


def test_what_does_not_recur_so_often_is_left_alone() -> None:
    torch.manual_seed(0)
    words = sentences(3, 2)
    graph = graph_of(Tagger(), words)
    assert time_chunks(graph, 1) is graph
    assert time_chunks(graph, 4) is graph
    layers = nn.Sequential(
        nn.Embedding(WORDS, WIDTH), *(nn.Linear(WIDTH, WIDTH) for _ in range(8)), nn.Linear(WIDTH, WORDS)
    )
    plain = graph_of(layers, words)
    assert time_chunks(plain, 2) is plain
    both_ways = graph_of(Tagger(nn.RNN, modules=1, bidirectional=True), words)
    assert time_chunks(both_ways, 2) is both_ways


@pytest.mark.long
def test_chunks_of_microbatches_of_split_layers() -> None:
    torch.manual_seed(0)
    batch_first = sentences(6, 4, batch_first=True)
    graph = graph_of(Tagger(nn.GRU, batch_first=True).double(), batch_first)
    chunked = time_chunks(split(graph, 2, min_width=8), 3)
    both = check(microbatch(chunked, 2))
    labels = batch_first.clamp(min=1)  # none ignored, so that both parts count the same
    parts = [part for pair in zip(batch_first.chunk(2), labels.chunk(2), strict=True) for part in pair]
    whole = {n: t for n, t in graph.initial.items() if n not in chunked.initial}
    assert whole  # the scores were split
    found = run(both, chunked.initial, parts, steps=3)
    plain = run(split(graph, 2, min_width=8), chunked.initial, [batch_first, labels], steps=3)
    same(found, plain)


def test_a_graph_is_cut_once() -> None:
    graph = graph_of(Tagger(), sentences(6, 2))
    chunked = time_chunks(graph, 2)
    with pytest.raises(GraphError, match="already"):
        time_chunks(chunked, 2)
    with pytest.raises(GraphError, match="at least one"):
        time_chunks(graph, 0)
    assert chunked.retrace is not None
    longer = sentences(9, 2)
    again = chunked.retrace((longer, longer.clone()))
    assert kernels(again) == 4
