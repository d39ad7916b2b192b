"""Replicas that compute on GPUs, for which a device stands in that has values and is no CPU. With GPUs: the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.graph.step_models import MODELS, step_graph
from tests.replicas import stand_in
from tests.replicas.real_session import session_over, train
from torch import Tensor, nn

from millrace.errors import SettingError, StepError
from millrace.replicas import nccl_group
from millrace.replicas.gpus import least_used
from millrace.replicas.settings import Async, Hybrid, LocalSteps, Sync
from millrace.runtime.device_worker import error_message
from millrace.runtime.launch import Launcher, ProcessLauncher
from millrace.runtime.session import Session
from millrace.train.fit import fit

MEMBER = "tests.replicas.stand_in.member"


def test_a_worker_has_the_gpu_that_fewest_others_of_its_machine_have() -> None:
    assert least_used(["0", "1", "2"], []) == 0
    assert least_used(["0", "1", "2"], ["0", "2"]) == 1
    assert least_used(["0", "1"], ["0", "1", "1"]) == 0
    assert least_used(["GPU-b"], ["GPU-a", "GPU-b"]) == 0  # it sees no other


def test_what_a_replica_computes_is_and_stays_on_its_gpu() -> None:
    """In a process of its own: one that has the stand-in takes it for the machine's accelerator everywhere."""
    cases = Path(stand_in.__file__).with_name("cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "170", str(cases)]
    done = subprocess.run(command, cwd=cases.parents[3], capture_output=True, text=True, timeout=190, check=False)
    assert done.returncode == 0, done.stdout
    assert "7 passed" in done.stdout


# -- whole runs, over processes ------------------------------------------------------------------------------------


def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def trained(steps: int = 6, **settings: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 3)).double()
    data = torch.randn(48, 6, dtype=torch.float64), torch.randint(0, 3, (48,))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    quiet: dict[str, Any] = {"batch_size": 8, "compile": "eager", "progress": False, "run_dir": False}
    fit(net, data, loss=loss, optimizer=optimizer, steps=steps, **{**quiet, **settings})
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What members tell of their GPUs and groups."""
    stand_in.built()  # a member has less time for it
    monkeypatch.setenv("STAND_IN_SEEN", str(tmp_path / "seen"))
    monkeypatch.setenv("STAND_IN_GPUS", "a,b")
    return lambda: (tmp_path / "seen").read_text().splitlines()


def groups(lines: list[str]) -> set[str]:
    return {line for line in lines if line == "NCCL" or line.endswith("of the hosts")}


ON_GPUS: dict[str, Any] = {"replicas": 2, "devices": "gpu", "imports": [MEMBER]}


def assert_like_one_process(found: dict[str, Tensor]) -> None:
    for name, value in trained().items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)


def test_replicas_with_gpus_of_their_own_meet_by_nccl(seen: Callable[[], list[str]]) -> None:
    assert_like_one_process(trained(**ON_GPUS))
    assert sorted(line.split(" has ")[1] for line in seen() if " has " in line) == ["GPU a", "GPU b"]
    assert groups(seen()) == {"NCCL"}


@pytest.mark.parametrize(
    ("gpus", "nccl", "settings", "group"),
    [
        ("a", "", {}, "SharedGroup of the hosts"),
        ("a,b", "none", {}, "SharedGroup of the hosts"),
        ("a,b", "", {"transport": "gloo"}, "GlooGroup of the hosts"),
    ],
)
def test_others_meet_on_their_hosts(
    seen: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    gpus: str,
    nccl: str,
    settings: dict[str, Any],
    group: str,
) -> None:
    monkeypatch.setenv("STAND_IN_GPUS", gpus)
    monkeypatch.setenv("STAND_IN_NCCL", nccl)
    assert_like_one_process(trained(**ON_GPUS, **settings))
    assert groups(seen()) == {group}


@pytest.mark.parametrize(
    ("update", "is_exact"),
    [
        (LocalSteps(every=3), False),
        (Sync(parameter_servers=2), True),
        pytest.param(Async(overlap=True), False, marks=pytest.mark.long),
        pytest.param(Hybrid(groups=1, replicas=2), True, marks=pytest.mark.long),
    ],
)
def test_every_way_to_agree_computes_on_gpus(seen: Callable[[], list[str]], update: Any, is_exact: bool) -> None:
    found = trained(**ON_GPUS, update=update)
    assert sum(" has GPU " in line for line in seen()) >= 2
    if is_exact:
        assert_like_one_process(found)
    elif isinstance(update, LocalSteps):
        expected = trained(replicas=2, update=update)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)
    else:  # the same batches, in an order of their own: every Adam step moves a weight by the rate at most
        for name, value in trained().items():
            distance = float((found[name] - value).abs().max())
            assert 0 < distance < 6 * 2 * 0.01


@pytest.mark.long
@pytest.mark.cluster
def test_a_local_ray_lets_its_processes_divide_the_gpus(seen: Callable[[], list[str]]) -> None:
    assert_like_one_process(trained(**ON_GPUS, cluster="local"))
    assert sorted(line.split(" has ")[1] for line in seen() if " has " in line) == ["GPU a", "GPU b"]
    assert groups(seen()) == {"NCCL"}


def launcher_in(directory: Path) -> Launcher:
    return ProcessLauncher("millrace.replicas.member", ["--gpus", "--imports", MEMBER], 1, directory)


def test_it_is_said_once_that_some_share_a_gpu(seen: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_GPUS", "a,b")
    said: list[str] = []
    with session_over(
        step_graph("mlp", "adamw"), Sync(), 4, gpus=True, launcher_in=launcher_in, say=said.append
    ) as session:
        train(session, MODELS["mlp"][1], 1)
    had = [line.split(" has ")[1] for line in seen() if " has " in line]
    assert sorted(had) == ["GPU a", "GPU a", "GPU b", "GPU b"]
    assert sum("has fewer GPUs than replicas (2): some share one" in line for line in said) == 1


def test_whoever_takes_the_place_of_a_lost_worker_has_its_gpu(seen: Callable[[], list[str]]) -> None:
    graph = step_graph("mlp", "adamw")
    whole = Session(graph, copy=True, compile="eager")
    with session_over(graph, Sync(), 2, spares=1, gpus=True, launcher_in=launcher_in) as session:
        expected = train(whole, MODELS["mlp"][1], 6)
        found = train(session, MODELS["mlp"][1], 3)
        lost = session.workers[1]
        session.kill(lost)
        found += train(session, MODELS["mlp"][1], 3, first=3)
        assert found == pytest.approx(expected, rel=1e-9)
        had = dict(line.split(" has ") for line in seen() if " has " in line)
        (replacement,) = had.keys() & set(session.workers) - set(list(had)[:2])
        assert len(had) == 3
        assert had[replacement] == had[lost]
        assert groups(seen()) == {"NCCL"}  # nobody shares one
        assert "aborted" in seen()


def test_an_interface_is_found_by_its_address() -> None:
    assert nccl_group._interface_of("127.0.0.1") == "lo"
    assert nccl_group._interface_of("192.0.2.1") is None  # an address that nobody has


@pytest.mark.parametrize(("number", "kind"), [(214, "WorkerError"), (710, "StepError")])
def test_a_gpu_that_fails_costs_its_worker_and_an_assert_on_it_ends_the_run(number: int, kind: str) -> None:
    failed = torch.AcceleratorError("CUDA error: said by the stand-in")
    failed.error_code = number  # as PyTorch sets it
    error = StepError("the step failed at node 'mm'")
    error.__cause__ = failed
    assert error_message(error).fields["type"] == kind


def test_machines_without_gpus_are_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(SettingError, match="PyTorch sees none on"):
        trained(replicas=2, devices="gpu")


@pytest.mark.parametrize("settings", [{"microbatches": 2}, {"time_chunks": 2}, {"placement": {"0": "gpu:0"}}])
def test_one_gpu_is_not_divided(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="each has one GPU"):
        trained(replicas=2, devices="gpu", **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("update", ["sync", Sync(parameter_servers=1), LocalSteps(every=3)])
def test_with_gpus_replicas_train_as_on_cpus(update: Any) -> None:
    found = trained(replicas=2, devices="gpu", update=update)
    expected = trained(replicas=2, update=update)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
