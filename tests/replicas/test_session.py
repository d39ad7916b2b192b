"""Steps over real worker processes, which are killed, frozen, added and taken away."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.graph.step_models import MODELS, batch_of, step_graph
from tests.replicas import slow_backward
from tests.replicas.real_session import EXAMPLES, mortals_in, pid_of, session_over, train, values_of
from torch import Tensor

from millrace.errors import FeedError, FetchError, MillraceError, WorkerError
from millrace.graph.graph import TRAIN
from millrace.graph.training import training_graph
from millrace.replicas import stages
from millrace.replicas.session import ReplicatedSession
from millrace.replicas.settings import Async, Sync, Travel, Update
from millrace.runtime.launch import ProcessLauncher
from millrace.runtime.session import Session


def workers_of(session: ReplicatedSession) -> list[str]:
    """Those that hold a slice, in the order of their slices."""
    seats = {m.seat: name for name, m in session._coordinator.members.items() if m.seat is not None}
    return [seats[seat] for seat in sorted(seats)]


@pytest.mark.parametrize(("model", "replicas"), [("lstm", 2)])
def test_replicas_take_the_steps_of_one_session(model: str, replicas: int) -> None:
    graph, kind = step_graph(model, "millrace adam clipped"), MODELS[model][1]
    whole = Session(graph, copy=True, compile="eager")
    expected = train(whole, kind, 4)
    with session_over(graph, Sync(), replicas) as session:
        found = train(session, kind, 4)
        after = values_of(session)
        assert found == pytest.approx(expected, rel=1e-9)
        for name, value in whole.variables.items():
            torch.testing.assert_close(after[name], value, rtol=1e-9, atol=1e-9)
        # A batch with fewer examples than replicas, and one of another size.
        for size in (1, 2 * EXAMPLES):
            batch = batch_of(kind, size, 9)
            torch.testing.assert_close(session.run([TRAIN, "hits"], batch)[1], whole.run([TRAIN, "hits"], batch)[1])
        with pytest.raises(FetchError, match=r"'los' is no fetch of a step over replicas\. Did you mean 'loss'"):
            session.run([TRAIN, "los"], batch)
        assert torch.isfinite(session.run("loss", batch))
        # What is assigned reaches the workers.
        name = graph.variables[0].name
        session.assign(name, torch.zeros_like(whole.variables[name]))
        whole.assign(name, torch.zeros_like(whole.variables[name]))
        assert train(session, kind, 1) == pytest.approx(train(whole, kind, 1), rel=1e-9)


def losses_of(session: ReplicatedSession) -> int:
    """How many members were lost, whatever they were doing."""
    return sum("was lost, seat" in story for story in session.stories)


Fault = Callable[[int], None]


def killed(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def frozen(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


@pytest.mark.parametrize(("fault", "slice_"), [(killed, 0), (frozen, 2)])
def test_a_lost_worker_costs_the_step_in_flight_and_no_bit_of_the_result(fault: Fault, slice_: int) -> None:
    """A spare takes its place; the variables are those of a run without faults, bit for bit."""
    graph = step_graph("cnn", "adamw")
    with session_over(graph, Sync(), 3) as session:
        expected, final = train(session, "images", 12), values_of(session)
        lost_before = losses_of(session)  # on a busy machine, workers may seem frozen
    with session_over(graph, Sync(), 3, spares=1) as session:
        found = train(session, "images", 4)
        while len(session.members) < 4:  # the spare comes later
            time.sleep(0.05)
        threading.Timer(0.05, fault, [pid_of(session, workers_of(session)[slice_])]).start()
        began_s = time.monotonic()
        found += train(session, "images", 12 - len(found), len(found))
        print(f"{fault.__name__}: {time.monotonic() - began_s:.2f} s")
        after = values_of(session)
        for name, value in final.items():
            torch.testing.assert_close(after[name], value, rtol=1e-9, atol=1e-9)
        if (lost_before, losses_of(session)) == (0, 1):
            assert all(torch.equal(after[name], value) for name, value in final.items())
            assert found == expected


def test_a_worker_that_dies_when_others_have_its_gradients_does_not_take_its_results_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIES_IN_UPDATE", str(tmp_path / "now"))
    graph = step_graph("mlp", "adamw")
    expected = train(Session(graph, copy=True, compile="eager"), "numbers", 6)
    with session_over(graph, Sync(), 2, spares=1, launcher_in=mortals_in, patience_s=20.0) as session:
        found = train(session, "numbers", 3)
        (tmp_path / "now").touch()
        found += train(session, "numbers", 3, 3)
        assert found == pytest.approx(expected, rel=1e-9)
        assert losses_of(session) == 1
        assert session.repeats == 0  # the step in flight was done without it


def test_survivors_share_the_slices_of_whom_nobody_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result stays that of the whole batch, with as many slices as before."""
    graph = step_graph("mlp", "adamw")
    whole = Session(graph, copy=True, compile="eager")
    expected = train(whole, "numbers", 8)
    with session_over(graph, Sync(), 3) as session:
        found = train(session, "numbers", 3)
        monkeypatch.setattr(session._hub, "start", lambda count: None)  # nobody comes
        killed(pid_of(session, workers_of(session)[1]))
        found += train(session, "numbers", 5, 3)
        assert found == pytest.approx(expected, rel=1e-9)
        assert len(workers_of(session)) == 2
        assert any("was lost" in story or "lost" in story for story in session.stories)


def test_who_has_taken_a_seat_and_has_no_variables_yet_is_nobody_to_rely_on() -> None:
    with session_over(step_graph("mlp", "sgd"), Sync(), 2) as session:
        train(session, "numbers", 2)
        assert session.may_lose_a_worker
        lost = session.workers[0]
        os.kill(pid_of(session, lost), signal.SIGKILL)
        end_s = time.monotonic() + 20.0
        while lost in session.workers or len(session.workers) < 2:
            assert time.monotonic() < end_s
            session._hear(0.05)
        assert not session.may_lose_a_worker
        while not session.complete:
            assert time.monotonic() < end_s
            train(session, "numbers", 1)
        assert session.may_lose_a_worker


def test_replicas_are_added_and_taken_away_while_it_runs() -> None:
    graph = step_graph("mlp", "adamw")
    whole = Session(graph, copy=True, compile="eager")
    expected = train(whole, "numbers", 9)
    with session_over(graph, Sync(), 1) as session:
        found = train(session, "numbers", 3)
        session.resize(3)
        while len(session.members) < 3:
            time.sleep(0.05)
        found += train(session, "numbers", 3, 3)
        assert len(workers_of(session)) == 3
        session.resize(2)
        found += train(session, "numbers", 3, 6)
        assert len(workers_of(session)) == 2
        assert found == pytest.approx(expected, rel=1e-9)


def failing(model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """An index out of range for some batches."""
    table = torch.arange(4.0, dtype=torch.float64)
    return (model(batch[0]).sum(1) * table[batch[1]]).mean()


def test_an_error_of_the_model_ends_the_run_and_names_worker_step_and_line() -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 3).double()
    batch = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 2, 1])
    graph = training_graph(net, failing, torch.optim.SGD(net.parameters(), lr=0.1), batch)
    with session_over(graph, Sync(), 2) as session:
        session.run([TRAIN, "loss"], batch)
        bad = batch[0], torch.tensor([0, 1, 2, 3, 2, 9])
        with pytest.raises(MillraceError, match=r"(?s)(worker m\d, step 2: .*)?test_session.py:\d+ in failing"):
            session.run([TRAIN, "loss"], bad)


def flattened(model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Labels of many lengths, which a graph of one length arranges by its own sizes."""
    return torch.nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


@pytest.mark.parametrize("rule", [Sync(), Async()], ids=["in step", "on their own"])
def test_batches_of_another_length_are_looked_through_by_their_own_sizes(rule: Update) -> None:
    torch.manual_seed(0)
    net = torch.nn.Embedding(5, 7).double()

    def batch(length: int, label: int = 6) -> tuple[Tensor, Tensor]:
        return torch.zeros(4, length, dtype=torch.int64), torch.full((4, length), label)

    graph = training_graph(net, flattened, torch.optim.SGD(net.parameters(), lr=0.1), batch(9))
    with session_over(graph, rule, 2) as session:
        for length in (9, 7, 3):
            session.run([TRAIN, "loss"], batch(length))
        with pytest.raises(FeedError, match="holds 7, but expected are labels or indices from 0 to 6"):
            session.run([TRAIN, "loss"], batch(7, label=7))


def test_everybody_lost_at_once_ends_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = step_graph("mlp", "sgd")
    with session_over(graph, Sync(), 2) as session:
        train(session, "numbers", 2)
        monkeypatch.setattr(session._hub, "start", session._hub.start)
        for member in session.members:
            killed(pid_of(session, member))
        with pytest.raises(WorkerError, match=r"(?s)What happened:.*SIGKILL"):
            train(session, "numbers", 3, 2)


# -- gradients added up while others are computed ----------------------------------------------------------------------


@pytest.fixture
def small_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "LEAST_BYTES", 1)


@pytest.mark.parametrize("transport", [None, "gloo"])
@pytest.mark.usefixtures("small_stages")
def test_adding_up_early_changes_no_bit(transport: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between three ranks, where the order of a sum shows; a worker that has two slices gives them together."""
    graph = step_graph("cnn", "adamw")
    found = []
    for overlap in (False, True, None):
        with session_over(graph, Sync(), 3, travel=Travel(transport, overlap=overlap)) as session:
            assert session._stages
            losses = train(session, "images", 4)
            monkeypatch.setattr(session._hub, "start", lambda count: None)
            killed(pid_of(session, workers_of(session)[0]))
            losses += train(session, "images", 2, 4)
            found.append((losses, values_of(session)))
    for losses, values in found[1:]:
        assert losses == found[0][0]
        assert all(torch.equal(values[name], value) for name, value in found[0][1].items())


class _Slow(torch.nn.Module):
    """Slow in the middle of the backward pass, and before its begin if the batch is marked."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(4, 8).double(), torch.nn.Linear(8, 3).double()

    def forward(self, batch: Tensor) -> Tensor:
        between = slow_backward.slowly(self.first(batch), torch.full((1,), slow_backward.MARK), 0.4)
        return slow_backward.slowly(self.last(between), batch, 0.4)


def _marked(steps: int, marked: int) -> list[tuple[Tensor]]:
    """Batches of three slices, of which the last is late at first in one step."""
    batches = [torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in range(steps)]
    batches[marked][5] += 2 * slow_backward.MARK
    return [(batch,) for batch in batches]


@pytest.mark.parametrize(("fault", "transport"), [(killed, "gloo"), (frozen, "shared_memory")])
@pytest.mark.usefixtures("small_stages")
def test_a_worker_lost_while_a_bucket_is_in_flight(fault: Fault, transport: str) -> None:
    """The survivors have begun to add up the last layer's gradients, and still compute the first's."""
    torch.manual_seed(0)
    net = _Slow()
    batches = _marked(4, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    graph = training_graph(net, lambda model, batch: model(batch[0]).square().mean(), optimizer, batches[0])

    def launcher_in(directory: Path) -> ProcessLauncher:
        return ProcessLauncher("millrace.replicas.member", ["--imports", slow_backward.__name__], 1, directory)

    travel = Travel(transport, overlap=True)
    runs = []
    for is_hurt in (False, True):
        with session_over(graph, Sync(), 3, spares=1, launcher_in=launcher_in, travel=travel) as session:
            losses = []
            for step, batch in enumerate(batches):
                if is_hurt and step == 2:
                    while len(session.members) < 4:
                        time.sleep(0.02)
                    threading.Timer(0.2, fault, [pid_of(session, workers_of(session)[2])]).start()
                losses.append(float(session.run([TRAIN, "loss"], batch)[1]))
            runs.append((losses, values_of(session), losses_of(session)))
    assert runs[1][2] >= 1
    if [lost for _, _, lost in runs] == [0, 1]:  # on a busy machine, others may seem frozen as well
        assert runs[1][0] == runs[0][0]
        assert all(torch.equal(runs[1][1][name], value) for name, value in runs[0][1].items())
