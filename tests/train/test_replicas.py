"""`fit` over replicas that add up their gradients."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import millrace
from millrace.errors import SettingError
from millrace.replicas.session import ReplicatedSession
from millrace.replicas.settings import Async, Hybrid, LocalSteps, Sync, Update
from millrace.runtime.placed_session import PlacedSession
from millrace.train.callbacks import Callback, RunView
from millrace.train.fit import fit
from millrace.train.plan import Plan
from millrace.train.replicas import ReplicaRun, told_of_idle

RATE = 0.1
ROUNDED = 2.01 * 2**-8  # of what is added up, at most: see gloo_group
QUIET: dict[str, Any] = {"batch_size": 8, "compile": "eager", "progress": False, "run_dir": False}


def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def trained(
    steps: int, dtype: torch.dtype = torch.float32, data_steps: int | None = None, **settings: Any
) -> dict[str, Tensor]:
    """The weights of a small network after some steps. data_steps: for how many there is data."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 3)).to(dtype)
    examples = 8 * (data_steps or steps)
    data = torch.randn(examples, 6, dtype=dtype), torch.randint(0, 3, (examples,))
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    fit(net, data, loss=loss, optimizer=optimizer, steps=steps, **{**QUIET, **settings})
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


@functools.cache
def parts_of_first_step() -> dict[str, Tensor]:
    """Of every element of a gradient, the sum of the magnitudes of what two replicas add up."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 3))
    x, y = torch.randn(8, 6), torch.randint(0, 3, (8,))
    total = {name: torch.zeros_like(value) for name, value in net.named_parameters()}
    for half in (slice(0, 4), slice(4, 8)):
        gradients = torch.autograd.grad(loss(net, (x[half], y[half])), list(net.parameters()))
        for name, gradient in zip(total, gradients, strict=True):
            total[name] += gradient.abs() / 2
    return total


def test_gradients_travel_as_bfloat16_where_that_is_asked_for() -> None:
    plain = trained(1, replicas=2, spares=0)
    narrow = trained(1, replicas=2, spares=0, wire="bfloat16")
    assert any(not torch.equal(narrow[name], plain[name]) for name in plain)
    limits = {name: RATE * ROUNDED * value.max() for name, value in parts_of_first_step().items()}
    for name, value in plain.items():
        assert float((narrow[name] - value).abs().max()) <= limits[name] + 1e-7


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"wire": "int8"}, "gradients that replicas add up can travel as 'bfloat16'"),
        ({"wire": {"0": "bfloat16"}}, "gradients that replicas add up can travel as 'bfloat16'"),
        ({"wire": "bfloat16", "transport": "shared_memory"}, "nothing is narrowed"),
        ({"wire": "bfloat16", "update": "async"}, "parameter servers choose their own way"),
        ({"transport": "gloo", "update": Sync(parameter_servers=1)}, "parameter servers choose their own way"),
    ],
)
def test_what_cannot_be_narrowed_is_refused_at_once(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        trained(1, replicas=2, **settings)


def test_local_steps_can_be_narrowed_and_overlap_is_for_collectives() -> None:
    narrow = trained(2, replicas=2, spares=0, update=LocalSteps(every=2), wire="bfloat16")
    plain = trained(2, replicas=2, spares=0, update=LocalSteps(every=2))
    for name, value in plain.items():
        torch.testing.assert_close(narrow[name], value, rtol=0, atol=1e-3)
    with pytest.raises(SettingError, match="is for collectives"):
        Sync(parameter_servers=1, overlap=True)


@pytest.mark.long
def test_every_replica_can_be_divided_over_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    def session(*arguments: Any, **settings: Any) -> ReplicatedSession:
        made.append(settings)
        return ReplicatedSession(*arguments, **settings)

    monkeypatch.setattr("millrace.train.replicas.ReplicatedSession", session)
    expected = trained(3, torch.float64)
    wishes = {"placement": {"0": "cpu:0", "2": "cpu:1"}, "microbatches": 2}
    found = trained(3, torch.float64, replicas=2, spares=0, devices=2, **wishes)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)
    (settings,) = made
    assert settings["replicas"] == 2
    assert settings["devices"] is not None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"time_chunks": 2}, "time_chunks in replicas"),
        ({"update": LocalSteps(every=2)}, "local steps in replicas"),
    ],
)
def test_what_replicas_of_several_devices_cannot_do_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        trained(1, replicas=2, devices=2, **settings)


def test_a_resumed_run_has_the_momentum_of_the_outer_rule(tmp_path: Path) -> None:
    settings = {"replicas": 2, "spares": 0, "update": LocalSteps(every=1)}
    expected = trained(6, torch.float64, **settings)
    data_of_six = {"data_steps": 6, "run_dir": tmp_path / "run"}
    trained(3, torch.float64, **data_of_six, **settings)
    found = trained(6, torch.float64, **data_of_six, resume=True, **settings)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


EXAMPLES, BATCH = 48, 8


def with_seen(net: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and a number whose bits are the examples that were seen."""
    inputs, labels, ids = batch
    return F.cross_entropy(net(inputs), labels), {"seen": torch.bitwise_left_shift(torch.ones_like(ids), ids).sum()}


class Resizer(Callback):
    """Has a run go through some sizes; the next one when all workers of one have been there for some steps."""

    def __init__(self, sizes: list[int], workers_of_one: int) -> None:
        self._sizes, self._workers_of_one = sizes, workers_of_one
        self._size = self._steps = 0
        self._began_s = time.monotonic()
        self.seen: list[int] = []

    def on_start(self, run: RunView) -> None:
        self._next(run)

    def on_step(self, run: RunView, step: int, values: Mapping[str, Any]) -> None:
        self.seen.append(int(values["seen"]))
        time.sleep(0.002)  # in which processes start
        session = run._session  # type: ignore[attr-defined]
        there = session.complete and len(session.workers) == self._size * self._workers_of_one
        self._steps = self._steps + 1 if there else 0
        assert time.monotonic() < self._began_s + 100, list(session.stories)[-10:]
        if self._steps == 5:
            self._next(run)

    def _next(self, run: RunView) -> None:
        self._steps = 0
        if self._sizes:
            self._size = self._sizes.pop(0)
            run.resize(self._size)
        else:
            run.stop()


def seen_while_resized(sizes: list[int] | None, **settings: Any) -> tuple[list[int], dict[str, Tensor], int]:
    """What each step has seen, the weights after the last, and how many there were."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    data = torch.randn(EXAMPLES, 6, dtype=torch.float64), torch.randint(0, 3, (EXAMPLES,)), torch.arange(EXAMPLES)
    update = settings.get("update")
    resizer = Resizer(sizes or [], settings["replicas"] if isinstance(update, Hybrid) else 1)
    result = fit(
        net,
        data,
        loss=with_seen,
        optimizer=millrace.optim.adagrad(0.1),
        callbacks=[resizer] if sizes else [],
        **{"epochs": 10**4, **QUIET, "batch_size": BATCH, **settings},
    )
    return resizer.seen, dict(net.state_dict()), result.steps


@pytest.mark.parametrize(
    "update",
    [Sync(), Sync(parameter_servers=1, copies=False), LocalSteps(4), Async(copies=False), Hybrid(2, copies=False)],
    ids=["sync", "sync over servers", "local steps", "async", "hybrid"],
)
def test_a_callback_has_more_and_fewer_replicas_train_and_no_example_is_seen_twice(update: Update) -> None:
    """In each epoch every example is seen by one process once, and in sync the steps are those of one process."""
    seen, weights, steps = seen_while_resized([3, 1, 2], replicas=2, spares=0, update=update)
    assert len(seen) == steps
    per_epoch = EXAMPLES // BATCH
    for first in range(0, steps, per_epoch):
        epoch = seen[first : first + per_epoch]
        assert all(each.bit_count() == BATCH for each in epoch)
        assert functools.reduce(int.__or__, epoch).bit_count() == BATCH * len(epoch)
    if isinstance(update, Sync):
        _, alone, _ = seen_while_resized(None, steps=steps)
        for name, value in alone.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.long
@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_a_local_ray_has_room_for_as_many_as_are_wanted_later() -> None:
    pytest.importorskip("ray")
    seen, _, steps = seen_while_resized([7, 1], replicas=1, spares=0, cluster="local")
    assert len(seen) == steps


def test_what_cannot_be_resized_says_so() -> None:
    with pytest.raises(SettingError, match=r"resize\(3\) is for a run over replicas: start it with replicas=2, say"):
        seen_while_resized([3])
    with pytest.raises(SettingError, match=r"resize\(0\): expected a whole number of at least 1"):
        seen_while_resized([0], replicas=1, spares=0)


def test_replicas_for_whom_a_batch_has_no_slice_are_told_of() -> None:
    net = nn.Linear(6, 3)
    batch = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    graph = millrace.training_graph(net, loss, torch.optim.SGD(net.parameters(), lr=RATE), batch)
    assert told_of_idle(graph, 4) == ""
    assert "a batch of 4 examples has a slice for no more than 4 of 5 replicas" in told_of_idle(graph, 5)


def test_a_step_that_is_not_on_the_cpu_is_refused() -> None:
    net = nn.Linear(6, 3, device="meta")  # a device that every machine has
    batch = torch.empty(8, 6, device="meta"), torch.empty(8, dtype=torch.int64, device="meta")
    graph = millrace.training_graph(net, loss, torch.optim.SGD(net.parameters(), lr=RATE), batch)
    said = r"has tensors on meta\. Leave the model and its batches on the CPU"
    with pytest.raises(SettingError, match=said):
        ReplicaRun(Plan(steps=1, replicas=2), print).session(graph)
    nobody: Any = None
    with pytest.raises(SettingError, match=said):
        PlacedSession(graph, nobody, workers=nobody)
