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


class Bags(nn.Module):
    """A table of words, looked up in twice, one of bags, and a small one that a batch names all of."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.bags = nn.Embedding(HEIGHT, 4, padding_idx=3), nn.EmbeddingBag(HEIGHT, 6)
        self.few = nn.Embedding(5, 4)
        self.out = nn.Linear(10, 3)

    def forward(self, words: Tensor) -> Tensor:
        seen = self.words(words).mean(1) + self.words(words[:, 0]) + self.few(words[:, 1] % 5)
        return self.out(torch.cat([seen, self.bags(words)], 1))


def batch(seed: int, size: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(HEIGHT, (size, 3), generator=generator), torch.randint(3, (size,), generator=generator)


def graph_of(optimizer: object) -> Graph:
    torch.manual_seed(0)

    def loss(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(given[0]), given[1])

    return training_graph(Bags().double(), loss, optimizer, batch(0), seed=0)


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


def test_asynchronous_rows_outlive_their_server() -> None:
    """Two workers that overlap; the process with the larger table is killed in the middle."""
    graph = graph_of(millrace.optim.adagrad(0.3))
    batches = [batch(seed % 5) for seed in range(120)]
    with session_over(graph, Async(parameter_servers=2, overlap=True), 2, spares=1) as session:
        until(session, lambda: all_follow(session) and len(session.workers) == 2)
        losses, workers = [], session.workers
        for (_, loss), _ in session.stream([TRAIN, "loss"], batches):
            losses.append(float(loss))
            if len(losses) == 40:
                shard = next(i for i, part in enumerate(session._shards) if "bags.weight" in part.variables)
                os.kill(pid_of(session, session._pool.places[shard].holder), signal.SIGKILL)
        assert len(losses) == 120
        assert sum(losses[-20:]) < 0.3 * sum(losses[:20])
        assert session.workers == workers  # what was under way cost nobody its process
        assert session.repeats == 0
        assert session.staleness.total() == 120
        learnt = Session(graph, dict(session.variables), compile="eager")
        assert float(learnt.run("loss", batch(0))) < 0.3 * losses[0]


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
