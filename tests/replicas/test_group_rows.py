"""Groups of replicas over servers that hold embeddings: only the rows that a batch names travel, both ways."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from tests.replicas.counted_bytes import COUNTED, counted
from tests.replicas.real_session import pid_of, session_over
from tests.replicas.test_hybrid_session import all_formed
from tests.replicas.test_row_session import batch, graph_of, rows_to_tally, tallied, tally_graph, trained
from tests.replicas.test_server_session import all_follow, until

import millrace
from millrace.graph.graph import TRAIN
from millrace.replicas.settings import Hybrid, Travel
from millrace.runtime.launch import Launcher, ProcessLauncher
from millrace.runtime.session import Session


def test_a_group_of_one_trains_rows_as_whole_tables_bit_for_bit() -> None:
    graph = graph_of(millrace.optim.adagrad(0.5))
    whole = Session(graph, copy=True, compile="eager")
    with session_over(graph, Hybrid(groups=2, parameter_servers=2, copies=False), 1) as session:
        assert session.tables == ("words.weight", "bags.weight")
        assert trained(session, range(6)) == trained(whole, range(6))
        assert all(torch.equal(session.variables[name], value) for name, value in whole.variables.items())


def test_a_group_fetches_and_adds_up_the_rows_of_all_its_slices() -> None:
    """Three slices that name some rows in common, and a batch of which one member has nothing; then two of three."""
    graph = graph_of(millrace.optim.sgd(0.5))
    whole = Session(graph, copy=True, compile="eager")
    with session_over(graph, Hybrid(groups=1, parameter_servers=2, copies=False), 3) as session:
        expected = [float(whole.run([TRAIN, "loss"], batch(seed, size))[1]) for seed, size in ((0, 7), (1, 7), (2, 2))]
        found = [float(session.run([TRAIN, "loss"], batch(seed, size))[1]) for seed, size in ((0, 7), (1, 7), (2, 2))]
        os.kill(pid_of(session, session._pool.groups["g0"].formed[0]), signal.SIGKILL)
        found += trained(session, range(3, 6))
        assert found == pytest.approx([*expected, *trained(whole, range(3, 6))], rel=1e-9)
        for name, value in whole.variables.items():
            torch.testing.assert_close(session.variables[name], value, rtol=1e-9, atol=1e-9)


def bytes_of_steps(height: int, transport: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What the two members of a group take and give in three steps, with tables of so many rows."""
    directory.mkdir()
    monkeypatch.setenv(COUNTED, str(directory))

    def launcher_in(path: Path) -> Launcher:
        return ProcessLauncher("millrace.replicas.member", ["--imports", "tests.replicas.counted_bytes"], 1, path)

    graph = graph_of(millrace.optim.adagrad(0.5), height)
    travel = Travel(transport=transport)
    with session_over(graph, Hybrid(groups=1, copies=False), 2, launcher_in=launcher_in, travel=travel) as session:
        until(session, lambda: all_formed(session, 2))
        trained(session, range(3))
    return counted(directory)


@pytest.mark.parametrize("transport", ["shared_memory", "gloo"])
def test_what_travels_is_rows_whatever_the_size_of_the_table(
    transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = bytes_of_steps(300, transport, tmp_path / "small", monkeypatch)
    named = sum(len(batch(seed)[0].unique()) for seed in range(3))
    lookups = sum(batch(seed)[0].numel() for seed in range(3))
    row_bytes = (4 + 6) * 8  # of the two tables, one of which a batch looks up in twice
    assert found["fetched rows"] == found["pushed rows"] == named * row_bytes
    told = (lookups + lookups // 3 + lookups) * 8
    assert found["broadcast"] == 2 * (told + named * row_bytes + found["fetched whole"])  # at both members
    assert found["added up"] == 2 * (named * row_bytes + found["pushed whole"])
    assert bytes_of_steps(30_000, transport, tmp_path / "large", monkeypatch) == found


def test_every_row_is_counted_when_a_server_and_members_are_killed() -> None:
    """Nothing that was pushed is lost. A batch whose group broke counts once more if it had been pushed just before."""
    batches = rows_to_tally(90)
    with session_over(tally_graph(batches), Hybrid(groups=2), 2, spares=2) as session:
        pool = session._pool
        until(session, lambda: all_follow(session) and all_formed(session, 2))
        faults = {15: pool.places[0].holder, 35: pool.groups["g0"].formed[0], 55: pool.groups["g1"].formed[1]}
        for done, _ in enumerate(session.stream([TRAIN], batches)):
            if done in faults:
                os.kill(pid_of(session, faults[done]), signal.SIGKILL)
            if done == 25:
                assert session.repeats == 0  # the server's death cost nobody a batch
        again = session.read("rows.weight") - tallied(batches)
        assert not set(faults.values()) & set(session.members)
        assert session.repeats <= 2
        assert float(again.min()) >= 0
        assert float(again[:, 0].sum()) in [24.0 * times for times in range(session.repeats + 1)]
