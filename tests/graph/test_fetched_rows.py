"""Workers without tables, and updates of rows alone, train as whole tables do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.graph.step_models import WORDS, batch_of, step_graph
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import millrace
from millrace.compile.eager import compile_eager
from millrace.errors import FeedError, SettingError
from millrace.graph.check import check
from millrace.graph.graph import TRAIN, Graph
from millrace.graph.passes.fetched_rows import (
    FetchedRows,
    fetched_rows,
    looked_up,
    padded,
    row_tables,
    summed_rows,
    unique_rows,
)
from millrace.graph.passes.halves import halves
from millrace.graph.passes.row_update import row_update
from millrace.graph.passes.shards import shards
from millrace.graph.trace import flatten_feed
from millrace.graph.training import training_graph
from millrace.runtime.session import Session

LAZY = ["sgd", "adagrad", "millrace sgd", "millrace adagrad"]  # they leave a row without a gradient alone


class Server:
    """Holds all variables, and updates the named tables by rows."""

    def __init__(self, graph: Graph, tables: Sequence[str]) -> None:
        self.update = halves(graph).update
        check(row_update(self.update, dict.fromkeys(tables, 2)))
        self.variables = {name: tensor.detach().clone() for name, tensor in graph.initial.items()}

    def apply(self, given: dict[str, Tensor], rows: dict[str, tuple[Tensor, Tensor]]) -> None:
        given |= {f"indices/{name}": indices for name, (indices, _) in rows.items()}
        given |= {f"gradient/{name}": values for name, (_, values) in rows.items()}
        graph = row_update(self.update, {name: len(indices) for name, (indices, _) in rows.items()})
        compile_eager(graph)([self.variables[v.name] for v in graph.variables], [given[f.name] for f in graph.feeds])


def worker_step(
    found: FetchedRows, batch: Any, variables: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """What a worker that has fetched its rows pushes: dense gradients, and for every table (rows, gradients)."""
    flat = flatten_feed(batch)[0]
    wanted = run(found.indices, {}, flat)
    given, unique = dict(flat), {}
    for table in found.tables:
        rows, places = unique_rows(wanted[table.indices_fetch], table.spec.shape[0])
        given[table.rows_feed] = padded(variables[table.name][rows], len(places))
        given[table.places_feed] = places
        unique[table.name] = rows
    values = run(found.gradients, variables, given)
    sparse = {t.name: (unique[t.name], values[t.exchanged][: len(unique[t.name])]) for t in found.tables}
    for table in found.tables:
        assert not values[table.exchanged][len(unique[table.name]) :].any()
    names = [f.name for f in found.exchanged if f.name not in {t.exchanged for t in found.tables}]
    return {"loss": values["loss"]} | {name: values[name] for name in names}, sparse


def run(graph: Graph, variables: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    values = compile_eager(graph)([variables[v.name] for v in graph.variables], [given[f.name] for f in graph.feeds])
    return dict(zip(graph.fetches, values, strict=True))


def against_whole(graph: Graph, batches: Sequence[Any], tolerance: float = 1e-12) -> None:
    """Rows fetched and pushed leave the variables that the whole step leaves."""
    found = fetched_rows(halves(graph))
    check(found.gradients)
    check(found.indices)
    assert found.tables
    server = Server(graph, [table.name for table in found.tables])
    session = Session(graph, copy=True, compile="eager")
    for batch in batches:
        (expected, _) = session.run(["loss", TRAIN], batch)
        dense, sparse = worker_step(found, batch, server.variables)
        torch.testing.assert_close(dense.pop("loss"), expected, rtol=tolerance, atol=tolerance)
        server.apply(dense, sparse)
    for name, tensor in session.variables.items():
        torch.testing.assert_close(server.variables[name], tensor, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("optimizer", LAZY)
def test_rows_train_as_the_whole_table(optimizer: str) -> None:
    against_whole(step_graph("embedding", optimizer), [batch_of("words", seed=seed) for seed in range(3)])


class TwoLooks(nn.Module):
    """One table looked up in twice, in other shapes, and one with padding; a third is not only looked up in."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.padding = nn.Embedding(9, 4), nn.Embedding(7, 4, padding_idx=2)
        self.tied = nn.Embedding(5, 4)

    def forward(self, words: Tensor, word: Tensor) -> Tensor:
        seen = self.twice(words).mean(1) * self.twice(word % 9) + self.padding(words % 7).sum(1)
        return (seen + self.tied(word % 5)) @ self.tied.weight.t()


def two_looks(optimizer: Any) -> Graph:
    torch.manual_seed(0)
    model = TwoLooks().double()
    example = (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    return training_graph(model, lambda m, b: F.cross_entropy(m(*b), b[1] % 5), optimizer(model), example)


@settings(max_examples=6, deadline=None)
@given(words=st.lists(st.integers(0, 8), min_size=15, max_size=15))
def test_several_lookups_of_one_table_are_summed_and_padding_has_no_gradient(words: list[int]) -> None:
    graph = two_looks(lambda m: torch.optim.Adagrad(m.parameters(), lr=0.1))
    batch = (torch.tensor(words[:12]).reshape(3, 4), torch.tensor(words[12:]))
    assert [table.name for table in row_tables(halves(graph))] == ["twice.weight", "padding.weight"]
    against_whole(graph, [batch, batch])


class Bags(nn.Module):
    """Bags of one length, and bags that begin where the batch says."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.even, self.uneven = nn.EmbeddingBag(9, 4, mode=mode), nn.EmbeddingBag(7, 4, mode=mode)
        self.padded = nn.EmbeddingBag(8, 4, padding_idx=1)

    def forward(self, words: Tensor, starts: Tensor) -> Tensor:
        return self.even(words) * self.uneven(words.flatten() % 7, starts) + self.padded(words % 8)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_train_as_with_whole_tables(mode: str) -> None:
    torch.manual_seed(0)
    batch = (torch.tensor([[8, 1, 1, 0], [1, 2, 3, 4], [1, 1, 1, 1]]), torch.tensor([0, 1, 8]))
    model = Bags(mode).double()
    graph = training_graph(model, lambda m, b: m(*b).square().sum(), millrace.optim.adagrad(0.1), batch)
    found = {name: bool(reason) for name, reason in looked_up(halves(graph)).items()}
    assert found == {"even.weight": False, "uneven.weight": False, "padded.weight": True}
    against_whole(graph, [batch, (batch[0].flip(0), torch.tensor([0, 5, 6]))])


def test_slices_push_rows_whose_sum_is_the_whole_batch() -> None:
    graph = step_graph("embedding", "adagrad")
    found, server = fetched_rows(halves(graph)), Server(graph, ["table.weight"])
    session = Session(graph, copy=True, compile="eager")
    words, labels = batch_of("words")
    session.run(TRAIN, (words, labels))
    pushes = []
    for part in (slice(0, 2), slice(2, 6)):
        batch = (words[part], labels[part])
        count = 4 * len(labels[part])
        assert found.gradients.retrace is not None
        assert found.indices.retrace is not None
        example = {f.name: torch.empty(0) for f in found.gradients.feeds} | flatten_feed(batch)[0]
        gradients, indices = found.gradients.retrace(example), found.indices.retrace(batch)
        assert [f.spec.shape for f in check(gradients).feeds][2:] == [(count, 8), (count,)]
        smaller = FetchedRows(gradients, check(indices), found.tables, found.exchanged)
        dense, sparse = worker_step(smaller, batch, server.variables)
        weight = len(labels[part]) / len(labels)
        rows, values = sparse["table.weight"]
        pushes.append(({name: tensor * weight for name, tensor in dense.items()}, (rows, values * weight)))
    dense = {name: pushes[0][0][name] + pushes[1][0][name] for name in pushes[0][0]}
    server.apply(dense, {"table.weight": summed_rows([rows for _, rows in pushes])})
    for name, tensor in session.variables.items():
        torch.testing.assert_close(server.variables[name], tensor, rtol=1e-9, atol=1e-12)


def test_rows_that_no_batch_names_rest() -> None:
    graph = step_graph("embedding", "momentum")
    found, server = fetched_rows(halves(graph)), Server(graph, ["table.weight"])
    before = server.variables["table.weight"].clone()
    words = torch.zeros(6, 4, dtype=torch.int64) + torch.arange(6)[:, None] % 3  # rows 0, 1, 2 of 11
    for _ in range(2):
        server.apply(*worker_step(found, (words, batch_of("words")[1]), server.variables))
    assert before[3:].equal(server.variables["table.weight"][3:])
    assert bool((before[:3] != server.variables["table.weight"][:3]).all())


class Largest(TorchDispatchMode):
    """The most elements of a result that is no variable."""

    def __init__(self, variables: Sequence[Tensor]) -> None:
        super().__init__()
        self._known, self.elements = {tensor.data_ptr() for tensor in variables}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.data_ptr() not in self._known:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adagrad", "adamw", "millrace adagrad"])
def test_the_cost_does_not_depend_on_the_size_of_the_table(optimizer: str) -> None:
    graph = row_update(halves(step_graph("embedding", optimizer)).update, {"table.weight": 2})
    (shard,) = shards(halves(step_graph("embedding", optimizer)).update, 1)
    assert len(row_update(shard.graph, {"table.weight": 2}).nodes) == len(graph.nodes)
    compiled, height = compile_eager(graph), 20_000
    variables = []
    for variable in graph.variables:
        shape = variable.spec.shape
        shape = (height, *shape[1:]) if variable.owner == "table.weight" and shape else shape
        variables.append(torch.ones(shape, dtype=variable.spec.dtype))
    feeds = [torch.ones(f.spec.shape, dtype=f.spec.dtype) for f in graph.feeds]
    at = {feed.name: position for position, feed in enumerate(graph.feeds)}
    feeds[at["indices/table.weight"]] = torch.tensor([3, height - 1, 7])  # three rows, where two were traced
    feeds[at["gradient/table.weight"]] = torch.ones(3, 8, dtype=torch.float64)
    with Largest(variables) as seen:
        compiled(variables, feeds)
    assert seen.elements <= 64
    table = variables[[v.name for v in graph.variables].index("table.weight")]
    changed = (table != 1).all(1).nonzero().flatten().tolist()
    assert changed == [3, 7, height - 1]


def test_a_session_takes_any_number_of_rows() -> None:
    graph = row_update(halves(step_graph("embedding", "adagrad")).update, {"table.weight": 2})
    session = Session(graph, copy=True, compile="eager", warn_new_shape=False)
    before = session.read("table.weight")
    given = {f.name: torch.ones(f.spec.shape, dtype=f.spec.dtype) for f in graph.feeds}
    given["indices/table.weight"] = torch.tensor([1, 4, 9])
    given["gradient/table.weight"] = torch.ones(3, 8, dtype=torch.float64)
    session.run(TRAIN, given)
    assert (session.read("table.weight") != before).all(1).nonzero().flatten().tolist() == [1, 4, 9]


def test_what_cannot_be_done_by_rows_is_refused_with_the_reason() -> None:
    with pytest.raises(SettingError, match="which is no lookup"):
        fetched_rows(halves(step_graph("tied", "sgd")), ["table.weight"])
    with pytest.raises(SettingError, match="no lookup"):
        fetched_rows(halves(step_graph("embedding", "sgd")), ["head.weight"])
    assert row_tables(halves(step_graph("mlp", "sgd"))) == ()
    torch.manual_seed(0)
    clipped = halves(two_looks(lambda _: millrace.optim.adam(0.1, clip_norm=1.0))).update
    with pytest.raises(SettingError, match=r"'linalg_vector_norm.*' \(.*:\d+.*does not work element by element"):
        row_update(clipped, {"twice.weight": 2})
    with pytest.raises(SettingError, match="no gradient of it"):
        row_update(clipped, {"step": 2})


def test_indices_out_of_range_are_named() -> None:
    rows, places = unique_rows(torch.tensor([4, 1, 4, 0]), WORDS)
    assert rows.tolist() == [0, 1, 4]
    assert rows[places].tolist() == [4, 1, 4, 0]
    with pytest.raises(FeedError, match="an index of the batch is 11, but the table has the rows 0 to 10"):
        unique_rows(torch.tensor([1, 11]), WORDS)
    with pytest.raises(FeedError, match="is -1"):
        unique_rows(torch.tensor([1, -1]), WORDS)
