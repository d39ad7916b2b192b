"""`fit` over replicas that add up their gradients."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millrace.errors import SettingError
from millrace.replicas.session import ReplicatedSession
from millrace.replicas.settings import LocalSteps, Sync
from millrace.train.fit import fit

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
