"""Sessions over servers that hold embeddings: only the rows that a batch names travel."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.replicas.real_session import pid_of, session_over
from tests.replicas.test_server_session import all_follow, until
from torch import Tensor, nn

import millrace
from millrace.graph.graph import TRAIN, Graph
from millrace.graph.training import training_graph
from millrace.replicas.settings import Async, Sync
from millrace.runtime.session import Session

HEIGHT = 200
TALLIED = 1000


class Bags(nn.Module):
    """A table of words, looked up in twice, one of bags, and a small one that a batch names all of."""

    def __init__(self, height: int = HEIGHT) -> None:
        super().__init__()
        self.words, self.bags = nn.Embedding(height, 4, padding_idx=3), nn.EmbeddingBag(height, 6)
        self.few = nn.Embedding(5, 4)
        self.out = nn.Linear(10, 3)

    def forward(self, words: Tensor) -> Tensor:
        seen = self.words(words).mean(1) + self.words(words[:, 0]) + self.few(words[:, 1] % 5)
        return self.out(torch.cat([seen, self.bags(words)], 1))


def batch(seed: int, size: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(HEIGHT, (size, 3), generator=generator), torch.randint(3, (size,), generator=generator)


def graph_of(optimizer: object, height: int = HEIGHT) -> Graph:
    torch.manual_seed(0)

    def loss(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(given[0]), given[1])

    return training_graph(Bags(height).double(), loss, optimizer, batch(0), seed=0)


def trained(session: object, seeds: range) -> list[float]:
    return [float(session.run([TRAIN, "loss"], batch(seed))[1]) for seed in seeds]  # type: ignore[attr-defined]


def test_rows_train_as_whole_tables_bit_for_bit(tmp_path: Path) -> None:
    graph = graph_of(millrace.optim.adagrad(0.5))
    whole = Session(graph, copy=True, compile="eager")
    expected = trained(whole, range(6))
    lines: list[str] = []
    with session_over(graph, Sync(parameter_servers=2, copies=False), 1, say=lines.append) as session:
        assert session.tables == ("words.weight", "bags.weight")
        assert [line for line in lines if "whole" in line] == [
            "the table 'few.weight' travels whole in every step: a batch looks 7 rows up, and it has 5"
        ]
        assert trained(session, range(6)) == expected
        assert all(torch.equal(session.variables[name], value) for name, value in whole.variables.items())
        session.save(tmp_path / "saved")
        expected = trained(whole, range(6, 8))
        assert trained(session, range(6, 8)) == expected
        session.restore(tmp_path / "saved")
        assert trained(session, range(6, 8)) == expected
        evaluated = session.run("loss", batch(9))  # in this process, with whole tables
        torch.testing.assert_close(evaluated, whole.run("loss", batch(9)), rtol=1e-12, atol=0)


def test_slices_that_name_the_same_rows_are_summed() -> None:
    graph = graph_of(millrace.optim.sgd(0.5))
    whole = Session(graph, copy=True, compile="eager")
    with session_over(graph, Sync(parameter_servers=2, copies=False), 3) as session:
        assert trained(session, range(5)) == pytest.approx(trained(whole, range(5)), rel=1e-9)
        for name, value in whole.variables.items():
            torch.testing.assert_close(session.variables[name], value, rtol=1e-9, atol=1e-9)


def test_a_copy_takes_over_with_all_rows() -> None:
    graph = graph_of(millrace.optim.adagrad(0.5))
    with session_over(graph, Sync(parameter_servers=2, copies=False), 2) as session:
        expected, final = trained(session, range(8)), dict(session.variables)
    with session_over(graph, Sync(parameter_servers=2), 2, spares=1) as session:
        found = trained(session, range(2))
        for shard in (0, 1):
            until(session, lambda: all_follow(session))
            os.kill(pid_of(session, session._pool.places[shard].holder), signal.SIGKILL)
            found += trained(session, range(len(found), len(found) + 3))
        assert found == expected
        assert all(torch.equal(session.variables[name], value) for name, value in final.items())


class Tally(nn.Module):
    """Its loss is minus the sum of the rows that a batch names, so that SGD counts in each row how often it was named,
    whatever the order of the updates."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(TALLIED, 3)
        nn.init.zeros_(self.rows.weight)

    def forward(self, words: Tensor) -> Tensor:
        return -self.rows(words).sum((1, 2))


def tally_graph(batches: list[Tensor]) -> Graph:
    def loss(model: nn.Module, words: Tensor) -> Tensor:
        return model(words).mean()

    return training_graph(Tally().double(), loss, millrace.optim.sgd(float(len(batches[0]))), batches[0], seed=0)


def tallied(batches: list[Tensor]) -> Tensor:
    """What the rows are when every batch has been pushed once."""
    counts = torch.bincount(torch.cat(batches).flatten(), minlength=TALLIED).double()
    return counts.unsqueeze(1).expand(TALLIED, 3)


def rows_to_tally(count: int) -> list[Tensor]:
    """Batches of eight examples. Some rows come in no other batch, and some in many."""
    own = torch.arange(8 * count).view(count, 8, 1)
    shared = torch.randint(8 * count, TALLIED, (count, 8, 2), generator=torch.Generator().manual_seed(0))
    return list(torch.cat([own, shared], 2))


@pytest.mark.parametrize("overlap", [False, True], ids=["alone", "overlap"])
def test_every_row_that_was_pushed_outlives_its_server(overlap: bool) -> None:
    """Two workers; the process with the table is killed in the middle, and then the one that took its place. Each row
    counts every batch that named it, those before each death too, and none twice."""
    batches = rows_to_tally(90)
    with session_over(tally_graph(batches), Async(overlap=overlap), 2, spares=1) as session:
        assert session.tables == ("rows.weight",)
        until(session, lambda: all_follow(session) and len(session.workers) == 2)
        workers, killed = session.workers, []
        for done, _ in enumerate(session.stream([TRAIN], batches)):
            if done in (30, 60):
                until(session, lambda: all_follow(session) or not session._open)
                killed.append(session.holders[0])
                os.kill(pid_of(session, killed[-1]), signal.SIGKILL)
        assert len({*killed, session.holders[0]}) == 3
        assert session.workers == workers  # what was under way cost nobody its process
        assert session.repeats == 0
        assert session.staleness.total() == len(batches)
        assert torch.equal(session.read("rows.weight"), tallied(batches))


def test_rows_of_several_batches_are_pushed_together() -> None:
    graph = graph_of(millrace.optim.sgd(0.5))
    batches = [batch(seed) for seed in range(4)]
    with session_over(graph, Async(fetch_every=2, push_every=2, copies=False), 1) as session:
        assert len(list(session.stream([TRAIN], batches))) == 4
        found = dict(session.variables)
    expected = Session(graph, copy=True, compile="eager")
    for pair in (batches[:2], batches[2:]):
        before = {name: value.clone() for name, value in expected.variables.items()}
        total = {name: torch.zeros_like(value) for name, value in before.items()}
        for one in pair:
            expected.run(TRAIN, one)
            for name, value in before.items():
                total[name] += expected.variables[name] - value
                expected.assign(name, value)
        for name, value in before.items():
            expected.assign(name, value + total[name])
    for name, value in expected.variables.items():
        if name != "step":
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)
