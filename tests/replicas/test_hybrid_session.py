"""Groups of replicas over parameter servers in real processes, which are killed and frozen."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from tests.graph.step_models import batch_of, step_graph
from tests.replicas.real_session import EXAMPLES, pid_of, session_over, train, values_of
from tests.replicas.test_server_session import Line, all_follow, until
from torch import Tensor, nn

import millrace
from millrace.graph.graph import TRAIN, Graph
from millrace.graph.training import training_graph
from millrace.replicas.hybrid_session import HybridSession
from millrace.replicas.settings import Async, Hybrid, Sync, Travel, Update


def all_formed(session: HybridSession, size: int) -> bool:
    groups = session._pool.groups.values()  # type: ignore[attr-defined]
    return all(len(group.formed) == size and not group.owes for group in groups)


def images_graph() -> Graph:
    """A step with statistics of its batch, and without random numbers."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    model = nn.Sequential(*layers).double()

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(net(batch[0]), batch[1])

    return training_graph(model, loss, millrace.optim.adamw(0.01), batch_of("images", EXAMPLES, 0), seed=0)


@pytest.mark.parametrize(
    ("hybrid", "replicas", "other"),
    [
        (Hybrid(groups=1, copies=False), 2, Sync(parameter_servers=1, copies=False)),
        (Hybrid(groups=2, copies=False), 1, Async(copies=False)),
    ],
)
def test_one_group_is_sync_and_groups_of_one_are_async(hybrid: Hybrid, replicas: int, other: Update) -> None:
    """Batch after batch, so that no gradient is stale."""
    graph = images_graph()
    with session_over(graph, other, 2) as session:
        expected, final = train(session, "images", 6), values_of(session)
    with session_over(graph, hybrid, replicas) as session:
        assert train(session, "images", 6) == pytest.approx(expected, rel=1e-9)
        for name, value in values_of(session).items():
            torch.testing.assert_close(value, final[name], rtol=1e-9, atol=1e-9)


def test_groups_narrow_their_gradients_as_collective_replicas_do() -> None:
    """The same bits as theirs, and others than without."""
    graph = step_graph("mlp", "adamw")
    narrow = Travel(wire="bfloat16")
    with session_over(graph, Sync(), 2, travel=narrow) as session:
        expected, final = train(session, "numbers", 6), values_of(session)
    for travel in (narrow, Travel(transport="gloo")):
        with session_over(graph, Hybrid(groups=1, copies=False), 2, travel=travel) as session:
            until(session, lambda: all_formed(session, 2))
            assert (train(session, "numbers", 6) == expected) == (travel is narrow)
            same = [torch.equal(value, final[name]) for name, value in values_of(session).items()]
            assert all(same) == (travel is narrow)


def test_groups_are_added_and_taken_away_while_it_runs() -> None:
    """Every batch is done once, in the middle of a stream or between two; a member of a new group is killed."""
    line = Line()
    graph = line.graph()
    with session_over(graph, Hybrid(groups=1), 2, spares=0) as session:
        until(session, lambda: session.complete and all_formed(session, 2))
        session.resize(3)
        until(session, lambda: session.complete and all_formed(session, 2))
        assert len(session.workers) == 6
        wanted = [(20, 1), (40, 4), (80, 2)]
        taken = 0
        for _ in session.stream([TRAIN], (line.batch() for _ in range(120))):
            taken += 1
            if wanted and taken == wanted[0][0]:
                session.resize(wanted.pop(0)[1])
            if taken == 60:
                os.kill(pid_of(session, session._pool.groups["g4"].members[-1]), signal.SIGKILL)
        until(session, lambda: session.complete and all_formed(session, 2) and len(session.workers) == 4)
        assert taken == 120
        assert 120 <= session.staleness.total() <= 120 + session.repeats
        assert session.repeats <= 1
        torch.testing.assert_close(session.read("weight"), line.truth.T, rtol=0.1, atol=0.1)


def test_a_lost_member_stops_its_group_alone() -> None:
    """A first of a group, another member and a server are killed, a member is frozen; every batch is done."""
    line = Line()
    graph = line.graph()
    faults = ["first killed", "second killed", "second frozen", "server killed"]
    with session_over(graph, Hybrid(groups=2), 2, spares=1) as session:
        pool = session._pool
        until(session, lambda: all_follow(session) and all_formed(session, 2))
        gone, losses = "", []
        healthy = alone = 0  # steps since all was well again; those taken while a group was broken

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            while faults or healthy < 50:
                yield line.batch()

        for (_, loss, tau), _ in session.stream([TRAIN, "loss", "staleness"], batches()):
            losses.append(float(loss))
            assert tau >= 0
            broken = [name for name, group in pool.groups.items() if gone in group.seats or len(group.formed) < 2]
            alone += len(broken) == 1 and "server" not in gone
            well = gone not in pool.members and not broken and all_follow(session) and pool._of("spare")
            healthy = healthy + 1 if well else 0
            if faults and healthy > 30:
                what, healthy = faults.pop(0), 0
                seats = pool.groups["g0"].formed
                gone = pool.places[0].holder if "server" in what else seats[0 if "first" in what else 1]
                os.kill(pid_of(session, gone), signal.SIGSTOP if "frozen" in what else signal.SIGKILL)
                print(f"{what} ({gone}) after {len(losses)} steps, {alone} of them by one group")
        handed_out = line.handed_out - 1  # one was traced with
        assert len(losses) == handed_out
        assert alone > 20
        assert handed_out <= sum(session.staleness.values()) <= handed_out + session.repeats
        assert 0 < session.mean_staleness < 2
        assert sum(losses[-20:]) < 1e-3 * sum(losses[:20])
        torch.testing.assert_close(session.read("weight"), line.truth.T, rtol=0.05, atol=0.05)
        print(f"{len(losses)} updates, staleness {dict(session.staleness)}, {session.repeats} repeated")


def test_a_group_gets_smaller_without_a_spare_and_has_the_same_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = step_graph("mlp", "adamw")
    with session_over(graph, Hybrid(groups=1, copies=False), 3) as session:
        expected = train(session, "numbers", 8)
    with session_over(graph, Hybrid(groups=1, copies=False), 3) as session:
        found = train(session, "numbers", 3)
        start = session._hub.start
        monkeypatch.setattr(session._hub, "start", lambda count: None)  # nobody comes
        os.kill(pid_of(session, session._pool.groups["g0"].formed[0]), signal.SIGKILL)
        found += train(session, "numbers", 3, 3)
        assert len(session._pool.groups["g0"].formed) == 2
        start(1)
        until(session, lambda: all_formed(session, 3))
        found += train(session, "numbers", 2, 6)
        assert found == pytest.approx(expected, rel=1e-9)
