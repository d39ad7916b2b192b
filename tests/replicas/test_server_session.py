"""Steps over parameter servers in real processes, which are killed and frozen."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.graph.step_models import MODELS, batch_of, step_graph
from tests.replicas.real_session import EXAMPLES, mortals_in, pid_of, session_over, train, values_of
from torch import Tensor, nn

import millrace
from millrace.errors import FeedError, FetchError, SettingError, WorkerError
from millrace.graph.graph import TRAIN, Graph
from millrace.graph.passes.halves import halves
from millrace.graph.training import training_graph
from millrace.replicas.server_session import ServerSession
from millrace.replicas.settings import Async, Sync
from millrace.runtime.session import Session

IDLE_S = 30.0  # for processes to start


def worker_of(session: ServerSession) -> str:
    return next(name for name, member in session._pool.members.items() if member.doing in ("free", "work"))


def names_of(session: ServerSession) -> set[str]:
    """Its workers, whatever they do."""
    return {name for name, member in session._pool.members.items() if member.doing in ("free", "work")}


def until(session: ServerSession, done: Callable[[], bool]) -> None:
    """Let the session hear its members until something is so."""
    end_s = time.monotonic() + IDLE_S
    while not done():
        assert time.monotonic() < end_s
        session._hear()


def all_follow(session: ServerSession) -> bool:
    return all(place.copy_state == "following" for place in session._pool.places)


@pytest.mark.parametrize(("model", "replicas"), [pytest.param("lstm", 2, marks=pytest.mark.long), ("cnn", 1)])
def test_servers_take_the_steps_of_one_session(model: str, replicas: int, tmp_path: Path) -> None:
    graph, kind = step_graph(model, "adamw"), MODELS[model][1]
    whole = Session(graph, copy=True, compile="eager")
    expected = train(whole, kind, 4)
    with session_over(graph, Sync(parameter_servers=2, copies=False), replicas) as session:
        found = train(session, kind, 4)
        after = values_of(session)
        assert found == pytest.approx(expected, rel=1e-9)
        for name, value in whole.variables.items():
            torch.testing.assert_close(after[name], value, rtol=1e-9, atol=1e-9)
        # A batch with fewer examples than replicas, and one of another size.
        for size in (1, 2 * EXAMPLES) if model != "cnn" else ():
            batch = batch_of(kind, size, 9)
            torch.testing.assert_close(session.run([TRAIN, "hits"], batch)[1], whole.run([TRAIN, "hits"], batch)[1])
        with pytest.raises(FetchError, match=r"'los' is no fetch of a step over servers\. Did you mean 'loss'"):
            session.run([TRAIN, "los"], batch_of(kind, 2))
        # What is assigned, or restored, reaches the servers and the workers.
        name = graph.variables[0].name
        for each in (session, whole):
            each.assign(name, torch.zeros_like(whole.variables[name]))
        assert train(session, kind, 1) == pytest.approx(train(whole, kind, 1), rel=1e-9)
        whole.save(tmp_path / "saved")
        train(session, kind, 1)
        session.restore(tmp_path / "saved")
        assert train(session, kind, 2, first=5) == pytest.approx(train(whole, kind, 2, first=5), rel=1e-9)


def test_lost_processes_cost_no_bit_of_a_synchronous_run() -> None:
    """A worker, a copy and a server are killed while a step is in flight."""
    graph = step_graph("cnn", "adamw")
    with session_over(graph, Sync(parameter_servers=2, copies=False), 2) as session:
        expected, final = train(session, "images", 14), values_of(session)
    with session_over(graph, Sync(parameter_servers=2), 2, spares=1) as session:
        found = train(session, "images", 2)
        places = session._pool.places
        for victim in ("worker", "copy", "server"):
            until(session, lambda: all_follow(session) and len(session.members) == 7)
            name = {"worker": worker_of(session), "copy": places[1].copy, "server": places[0].holder}[victim]
            os.kill(pid_of(session, name), signal.SIGKILL)
            began_s = time.monotonic()
            found += train(session, "images", 1, len(found))
            print(f"{victim} killed: the next step took {time.monotonic() - began_s:.2f} s")
            found += train(session, "images", 3, len(found))
        assert found == expected[: len(found)]
        found += train(session, "images", 14 - len(found), len(found))
        after = values_of(session)
    assert found == expected
    assert all(torch.equal(after[name], value) for name, value in final.items())


def test_a_worker_that_dies_when_shards_have_its_gradients_does_not_take_its_results_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its part of the loss nor that of the statistics which the forward pass collects."""
    monkeypatch.setenv("DIES_IN_UPDATE", str(tmp_path / "now"))
    graph, update = step_graph("cnn", "adamw"), Sync(parameter_servers=2, copies=False)
    with session_over(graph, update, 2, launcher_in=mortals_in) as session:
        expected, final = train(session, "images", 6), values_of(session)
    with session_over(graph, update, 2, spares=1, launcher_in=mortals_in, patience_s=20.0) as session:
        found = train(session, "images", 3)
        (tmp_path / "now").touch()
        found += train(session, "images", 3, 3)
        assert found == expected
        assert all(torch.equal(value, final[name]) for name, value in values_of(session).items())
        assert sum("was lost" in story for story in session.stories) >= 1


def test_a_frozen_backup_worker_delays_nobody() -> None:
    graph = step_graph("mlp", "sgd")
    with session_over(graph, Sync(parameter_servers=1, backup=1, copies=False), 1, spares=0) as session:
        until(session, lambda: len(session._pool._of("free")) == 2)
        train(session, "numbers", 20)
        name = worker_of(session)
        os.kill(pid_of(session, name), signal.SIGSTOP)
        times_s = []
        while name in session._pool.members:
            began_s = time.monotonic()
            train(session, "numbers", 1)
            times_s.append(time.monotonic() - began_s)
        print(f"{len(times_s)} steps while it was frozen, the longest {max(times_s):.3f} s; {session.dropped} dropped")
        assert len(times_s) > 3
        assert max(times_s) < 0.9  # before it was found
        before = session.dropped
        until(session, lambda: len(session._pool._of("free")) == 2)
        until(
            session, lambda: bool(train(session, "numbers", 20)) and session.dropped > before
        )  # the first of two counts


class Line:
    """Batches of a linear task, and what became of them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(8, 1, bias=True).double()
        self.truth = torch.randn(8, 1, dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(1)
        self.handed_out = 0

    def batch(self) -> tuple[Tensor, Tensor]:
        self.handed_out += 1
        x = torch.randn(16, 8, dtype=torch.float64, generator=self.generator)
        return x, x @ self.truth

    def graph(self) -> Graph:
        def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.mse_loss(model(batch[0]), batch[1])

        return training_graph(self.model, loss, millrace.optim.adagrad(0.3), self.batch(), seed=0)


@pytest.mark.parametrize("overlap", [False, True], ids=["alone", "overlap"])
def test_asynchronous_training_goes_on_whoever_is_lost(overlap: bool) -> None:
    """Workers and servers are frozen and killed; every batch is done, and the task learnt."""
    line = Line()
    graph = line.graph()
    faults = ["worker frozen", "worker killed", "server killed", "server frozen"]
    with session_over(graph, Async(overlap=overlap), 2, spares=2) as session:
        until(session, lambda: all_follow(session) and len(session._pool._of("free")) == 2)
        losses: list[float] = []
        what, gone, gap_s, last_s = "", "", 0.0, time.monotonic()
        healthy = 0  # steps since all was well again
        alone = 0  # steps while a worker was frozen
        before: tuple[set[str], int] = set(), 0  # the last fault

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            while faults or healthy < 50:
                yield line.batch()

        for (_, loss, tau), _ in session.stream([TRAIN, "loss", "staleness"], batches()):
            now_s = time.monotonic()
            gap_s, last_s = max(gap_s, now_s - last_s), now_s
            losses.append(float(loss))
            assert tau >= 0
            if gone and gone not in session._pool.members and all_follow(session):
                print(f"{gone} is replaced; the longest time without an update was {gap_s:.3f} s")
                if what == "server killed":  # what was under way cost no worker its process
                    assert (names_of(session), session.repeats) == before
                gone, healthy = "", 0
            workers = [m for m in session._pool.members.values() if m.doing in ("free", "work")]
            alone += bool(gone) and what == "worker frozen"
            ready = not gone and len(workers) == 2 and all_follow(session) and session._pool._of("spare")
            healthy = healthy + 1 if ready else 0
            if faults and healthy > 30:
                what = faults.pop(0)
                gone = worker_of(session) if "worker" in what else session._pool.places[0].holder
                os.kill(pid_of(session, gone), signal.SIGSTOP if "frozen" in what else signal.SIGKILL)
                print(what, end=": ")
                gap_s, healthy, last_s = 0.0, 0, time.monotonic()
                before = names_of(session), session.repeats
        handed_out = line.handed_out - 1  # one was traced with
        assert len(losses) == handed_out
        assert alone > 3  # updates went on without it
        assert handed_out <= sum(session.staleness.values()) <= handed_out + session.repeats
        assert sum(losses[-20:]) < 1e-3 * sum(losses[:20])
        torch.testing.assert_close(session.read("weight"), line.truth.T, rtol=0.05, atol=0.05)
        print(f"{len(losses)} updates, staleness {dict(session.staleness)}, {session.repeats} repeated")


@pytest.mark.parametrize("overlap", [False, True], ids=["alone", "overlap"])
def test_fetching_and_pushing_now_and_then(overlap: bool) -> None:
    """Gradients of three batches are pushed together; what is left at the end is pushed, too."""
    line = Line()
    graph = line.graph()
    batches = [line.batch() for _ in range(8)]
    with session_over(graph, Async(fetch_every=3, push_every=3, copies=False, overlap=overlap), 1) as session:
        found = list(session.stream([TRAIN, "loss"], batches))
        assert len(found) == 8
        assert sum(session.staleness.values()) == 3
        whole = Session(graph, compile="eager", copy=True)
        assert float(found[2][0][1]) == pytest.approx(float(whole.run("loss", batches[2])))
        with pytest.raises(FeedError):
            list(session.stream([TRAIN, "loss"], [batches[0], (torch.zeros(3), torch.zeros(4))]))
        assert len(list(session.stream([TRAIN, "loss"], batches[:2]))) == 2  # it goes on after that


@pytest.mark.parametrize("compile", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_overlapping_computes_with_what_lacks_the_last_update(compile: str) -> None:
    """One worker: batch k is computed with the variables after k - 1 updates, and all updates are made, in order. That
    variables lie elsewhere in every other batch is the same to a program that was compiled."""
    line = Line()
    graph = line.graph()
    batches = [line.batch() for _ in range(7)]
    whole = Session(graph, compile="eager", copy=True)
    cut = halves(graph)
    update = Session(cut.update, whole.variables, compile="eager")
    gradients = Session(cut.gradients, compile="eager", copy=True)
    expected = []
    for batch in batches:
        names = ["loss", *(feed.name for feed in cut.exchanged)]
        loss, *found = gradients.run(names, batch)
        expected.append(float(loss))
        for name, value in gradients.variables.items():
            value.copy_(whole.variables[name])
        update.run(TRAIN, dict(zip(names[1:], found, strict=True)))
    update = Async(overlap=True, parameter_servers=2, copies=False)
    with session_over(graph, update, 1, compile=compile) as session:
        found = [float(loss) for (_, loss), _ in session.stream([TRAIN, "loss"], batches[:4])]
        assert session.staleness == {0: 1, 1: 3}
        # Nothing is left in flight at the end of a stream; what was fetched before it counts still.
        found += [float(loss) for (_, loss), _ in session.stream([TRAIN, "loss"], batches[4:])]
        assert found == pytest.approx(expected, rel=1e-12)
        assert session.staleness == {0: 1, 1: 6}
        assert session.last_tier == compile
        for name, value in whole.variables.items():
            torch.testing.assert_close(session.read(name), value, rtol=1e-12, atol=1e-12)
        session.assign("weight", torch.zeros(1, 8))  # what was fetched is of no use any more
        session.assign("bias", torch.zeros(1))
        (((_, loss), _),) = session.stream([TRAIN, "loss"], batches[:1])
        assert float(loss) == pytest.approx(float(batches[0][1].square().mean()), rel=1e-12)


def test_more_servers_than_parameters_are_refused() -> None:
    with (
        pytest.raises(SettingError, match="parameter_servers=9"),
        session_over(step_graph("mlp", "sgd"), Async(parameter_servers=9), 1),
    ):
        pass


def test_what_is_left_of_a_stream_does_not_wait_for_a_session_that_is_closed() -> None:
    line = Line()
    with session_over(line.graph(), Async(copies=False), 1) as session:
        found = session.stream([TRAIN, "loss"], (line.batch() for _ in range(100)))
        next(found)
    found.close()
    with pytest.raises(WorkerError, match="this session is closed"):
        list(session.stream([TRAIN, "loss"], [line.batch()]))


@pytest.mark.parametrize("update", [Sync(parameter_servers=1), Async(push_every=2)])
def test_workers_are_added_and_taken_away_while_it_runs(update: Sync | Async) -> None:
    """A new one fetches from the servers; one that leaves pushes what it has."""
    graph = step_graph("mlp", "adamw")
    batches = [batch_of("numbers", EXAMPLES, step) for step in range(30)]

    def take(session: ServerSession, first: int, last: int) -> list[float]:
        return [float(found[1]) for found, _ in session.stream([TRAIN, "loss"], batches[first:last])]

    with session_over(graph, update, 1) as session:
        found = take(session, 0, 6)
        session.resize(3)
        until(session, lambda: session.complete)
        assert len(session.workers) == 3
        found += take(session, 6, 18)
        session.resize(2)
        found += take(session, 18, 30)
        until(session, lambda: session.complete)
        assert len(session.workers) == 2
        assert session.repeats == 0
        if isinstance(update, Sync):
            whole = Session(graph, copy=True, compile="eager")
            assert found == pytest.approx([float(whole.run([TRAIN, "loss"], batch)[1]) for batch in batches], rel=1e-9)
        assert len(found) == 30
