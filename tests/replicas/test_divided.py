"""Replicas that are divided over device processes: the steps of one session, and what is lost with one of those."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.graph.step_models import batch_of, step_graph
from tests.replicas.real_session import EXAMPLES, pid_of, session_over, train, values_of
from tests.replicas.test_row_session import graph_of, trained
from tests.replicas.test_server_session import until
from torch import Tensor

import millrace
from millrace.graph.graph import TRAIN
from millrace.place.cluster import CLASSES, Cluster, Device, Link
from millrace.place.hints import Hints
from millrace.replicas.divided import Devices
from millrace.replicas.settings import Async, Hybrid, Sync
from millrace.runtime.session import Session

RATES = dict.fromkeys(CLASSES, 1e9)
CLUSTER = Cluster(
    tuple(Device(f"/host:0/cpu:{number}", "cpu", 2**30, RATES) for number in range(2)), (Link("*", "*", 1e-5, 1e9),)
)
APART = Hints(modules={"0": "cpu:0", "2": "cpu:1"})  # of "mlp"


def children_of(pid: int) -> list[int]:
    """The device processes of a replica, which write to files that are named after the devices."""
    children = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    logs = {int(child): os.readlink(f"/proc/{child}/fd/2") for each in children for child in each}
    return [child for child, log in logs.items() if "cpu" in Path(log).name]


@pytest.mark.parametrize(
    ("update", "microbatches"),
    [
        (Sync(), 1),
        pytest.param(Sync(), 2, marks=pytest.mark.long),
        pytest.param(Sync(parameter_servers=1), 1, marks=pytest.mark.long),
    ],
)
def test_replicas_of_two_devices_take_the_steps_of_one_session(update: Sync, microbatches: int) -> None:
    graph = step_graph("mlp", "adamw")
    whole = Session(graph, copy=True, compile="eager")
    expected = train(whole, "numbers", 4)
    with session_over(graph, update, 2, devices=Devices(CLUSTER, APART, 0, microbatches)) as session:
        assert train(session, "numbers", 4) == pytest.approx(expected, rel=1e-9)
        for name, value in values_of(session).items():
            torch.testing.assert_close(value, whole.variables[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "update", [pytest.param(Async(copies=False), marks=pytest.mark.long), Hybrid(groups=2, copies=False)]
)
def test_a_replica_of_two_devices_takes_asynchronous_steps_bit_for_bit(update: Async | Hybrid) -> None:
    """Batch after batch, so that no gradient is stale."""
    graph = step_graph("mlp", "adamw")
    whole = Session(graph, copy=True, compile="eager")
    with session_over(graph, update, 1, devices=Devices(CLUSTER, APART)) as session:
        assert train(session, "numbers", 4) == train(whole, "numbers", 4)
        assert all(torch.equal(value, whole.variables[name]) for name, value in values_of(session).items())


@pytest.mark.long
def test_tables_travel_whole_to_replicas_of_two_devices() -> None:
    graph = graph_of(millrace.optim.adagrad(0.5))
    whole = Session(graph, copy=True, compile="eager")
    lines: list[str] = []
    apart = Devices(CLUSTER, Hints(modules={"words": "cpu:0", "bags": "cpu:1"}))
    with session_over(graph, Async(copies=False), 1, devices=apart, say=lines.append) as session:
        assert session.tables == ()
        notes = [line for line in lines if "travels whole" in line]
        assert len(notes) == 3
        assert all("a replica that is divided over devices is given all variables" in line for line in notes)
        assert trained(session, range(4)) == pytest.approx(trained(whole, range(4)), rel=1e-9)


@pytest.mark.long
def test_asynchronous_replicas_go_on_while_one_that_lost_a_device_is_replaced() -> None:
    graph = step_graph("mlp", "adamw")
    batches = itertools.cycle(batch_of("numbers", EXAMPLES, seed) for seed in range(5))
    settings = {"devices": Devices(CLUSTER, APART), "patience_s": 20.0}  # where others are busy, too
    with session_over(graph, Async(copies=False), 2, spares=1, **settings) as session:
        until(session, lambda: session.complete)
        before = session.workers
        losses: list[float] = []
        alone = after = 0  # steps while one was missing, and since all were there again
        began_s = time.monotonic()

        def given() -> Iterator[tuple[Tensor, Tensor]]:
            while after < 5:
                assert time.monotonic() < began_s + 150, list(session.stories)[-10:]
                yield next(batches)

        for (_, loss), _ in session.stream([TRAIN, "loss"], given()):
            losses.append(float(loss))
            if len(losses) == 20:
                killed_device(pid_of(session, before[0]))
                began_s = time.monotonic()
            elif len(losses) > 20:
                after += before[0] not in session.members and session.complete
                alone += not after
        took_s = time.monotonic() - began_s
        print(f"{alone} steps until it was replaced after {took_s:.2f} s; {session.repeats} repeated")
        assert alone > 5
        assert len(session.workers) == 2
        assert before[0] not in session.workers
        for new in set(session.workers) - set(before):
            assert len(children_of(pid_of(session, new))) == 2
            assert session._given[new]  # it has worked, and what it worked at is done
        assert len(losses) <= session.staleness.total() <= len(losses) + session.repeats
        assert sum(losses[-20:]) < sum(losses[:20])


def killed_device(pid: int) -> None:
    os.kill(children_of(pid)[0], signal.SIGKILL)


def frozen_device(pid: int) -> None:
    os.kill(children_of(pid)[1], signal.SIGSTOP)


def killed_replica(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@pytest.mark.long
def test_a_replica_is_replaced_that_lost_a_device_or_was_lost_and_leaves_none_behind() -> None:
    """And the run is that of another with the same replicas, in which nothing is lost."""
    graph = step_graph("mlp", "adamw")
    settings = {"spares": 1, "devices": Devices(CLUSTER, APART)}
    with session_over(graph, Sync(), 2, **settings) as session:
        expected, final = train(session, "numbers", 12), values_of(session)
    with session_over(graph, Sync(), 2, **settings) as session:
        found = train(session, "numbers", 3)
        devices = [device for member in session.workers for device in children_of(pid_of(session, member))]
        assert len(devices) == 4
        for first, fault in ((3, killed_device), (6, killed_replica), (9, frozen_device)):
            while len(session.members) < 3:  # the spare comes later
                time.sleep(0.05)
            before = session.workers
            fault(pid_of(session, before[0]))
            began_s = time.monotonic()
            found += train(session, "numbers", 3, first)
            print(f"{fault.__name__}: {time.monotonic() - began_s:.2f} s")
            assert before[0] not in session.workers
        devices += [device for member in session.workers for device in children_of(pid_of(session, member))]
        after = values_of(session)
    until_s = time.monotonic() + 5.0  # the system ends them with their parents
    while any(Path(f"/proc/{device}").exists() for device in devices):
        assert time.monotonic() < until_s
        time.sleep(0.02)
    for name, value in final.items():
        torch.testing.assert_close(after[name], value, rtol=1e-9, atol=1e-9)
    assert found == pytest.approx(expected, rel=1e-9)
