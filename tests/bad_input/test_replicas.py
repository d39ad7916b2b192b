"""What people get wrong with replicas, or what differs from run to run: it works, or says who, what and where."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millrace.errors import MillraceError
from millrace.replicas.settings import Sync
from millrace.runtime.checkpoint import Checkpoints
from millrace.train.fit import fit
from millrace.train.result import Result

QUIET: dict[str, Any] = {"compile": "eager", "progress": False}
WAYS = ["sync", "async"]


def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def looked_up(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, labels = batch
    places = labels + 7 * (inputs[:, 3] > 50).long()  # what is wrong with it shows only as it is computed
    return (net(inputs).sum(1) * torch.arange(3.0, dtype=torch.float64)[places]).mean()


def examples(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return inputs, inputs[:, :3].argmax(1)


def trained(data: Any, of: Any = loss, **settings: Any) -> tuple[dict[str, Tensor], Result]:
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    result = fit(net, data, loss=of, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), **{**QUIET, **settings})
    return {name: value.detach().clone() for name, value in net.state_dict().items()}, result


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.allclose(one[name], other[name], rtol=0, atol=1e-9) for name in one)


# -- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [13, 11, 9])  # the last batch: of 3, of 1 (fewer than replicas), of 4
def test_data_that_does_not_divide_trains_as_without_replicas(count: int) -> None:
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*examples(count)), batch_size=5)
    alone, _ = trained(batches, epochs=2, run_dir=False)
    together, result = trained(batches, epochs=2, run_dir=False, replicas=2, spares=0)
    assert same(alone, together)
    assert result.steps == 2 * -(-count // 5)


def test_replicas_without_examples_are_told_of(capfd: pytest.CaptureFixture[str]) -> None:
    _, result = trained(examples(4), batch_size=2, steps=2, run_dir=False, replicas=3, spares=0, progress=True)
    assert result.steps == 2
    assert "a batch of 2 examples has a slice for no more than 2 of 3 replicas" in " ".join(
        capfd.readouterr().err.split()
    )


# -- a step that fails in one replica --------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_fails_ends_the_run_with_replica_step_and_line(way: str, tmp_path: Path) -> None:
    inputs, labels = examples(40)
    inputs[37, 3] = 99.0
    batches = [(inputs[at : at + 8], labels[at : at + 8]) for at in range(0, 40, 8)]
    with pytest.raises(MillraceError) as failed:
        trained(batches, looked_up, epochs=1, replicas=2, spares=0, update=way, run_dir=tmp_path / "run")
    text = str(failed.value)
    assert re.match(r"worker m\d" + (", step 5: the step failed" if way == "sync" else ".*the step failed"), text)
    assert re.search(r"test_replicas\.py:\d+ in looked_up", text)
    assert "index 7 is out of bounds for dimension 0 with size 3" in text
    assert text in (tmp_path / "run" / "log.txt").read_text().replace("\n    ", "\n")


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "then"), [(2, 3), (3, None), (None, 2)])
def test_a_run_goes_on_with_another_number_of_replicas(first: int | None, then: int | None, tmp_path: Path) -> None:
    data = examples(24)
    alone, _ = trained(data, batch_size=8, steps=9, run_dir=False)
    trained(data, batch_size=8, steps=4, replicas=first, run_dir=tmp_path / "run")
    resumed, result = trained(data, batch_size=8, steps=9, replicas=then, run_dir=tmp_path / "run", resume=True)
    assert result.steps == 9
    assert same(alone, resumed)


def test_a_run_goes_on_with_another_number_of_servers_and_without_any(tmp_path: Path) -> None:
    data = examples(24)
    alone, _ = trained(data, batch_size=8, steps=9, run_dir=False)
    for steps, way in ((3, Sync(parameter_servers=2)), (6, Sync(parameter_servers=1)), (9, "sync")):
        after, _ = trained(
            data,
            batch_size=8,
            steps=steps,
            replicas=2,
            spares=0,
            update=way,
            run_dir=tmp_path / "run",
            resume=steps > 3,
        )
        assert Checkpoints(tmp_path / "run" / "checkpoints").load().step == steps
    assert same(alone, after)
