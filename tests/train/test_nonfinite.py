"""A NaN stops the run, names what made it first, and leaves no trace in what is saved."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.small import cross_entropy, labelled, mlp
from torch import Tensor, nn

import millrace
from millrace import RunDirectory, fit
from millrace.errors import NonFiniteError

QUIET: dict[str, Any] = {"compile": "eager", "progress": False}
BATCHES = [labelled(8, seed=n) for n in range(6)]


class Logarithm(nn.Module):
    """Of a number that falls by 1 with each step of SGD (its gradient is 1)."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self) -> Tensor:
        return torch.log(self.level.detach()) * 0.0 + self.level


class Falling(nn.Module):
    def __init__(self, start: float) -> None:
        super().__init__()
        self.inner = Logarithm(start)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner() + 0.0 * x.sum()


def falls(directory: Path | bool, start: float = 3.5, **settings: Any) -> tuple[Falling, str]:
    """What a run says whose logarithm turns NaN in step 5: 3.5, 2.5, 1.5, 0.5, -0.5."""
    model = Falling(start)
    with pytest.raises(NonFiniteError) as caught:
        fit(model, BATCHES, loss=lambda m, b: m(b[0]), optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            epochs=9, run_dir=directory, **(QUIET | settings))  # fmt: skip
    return model, str(caught.value)


def saved(directory: Path) -> dict[str, dict[str, Tensor]]:
    return {path.parent.name: load_file(path) for path in sorted(directory.glob("checkpoints/*/variables.safetensors"))}


def line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.strip().startswith(text))


@pytest.mark.parametrize("settings", [{}, {"checkpoint_every": 2}, {"steps_per_call": 3}, {"compile": "tiered"}])
def test_the_first_node_is_named_with_its_module_and_the_users_line(settings: dict[str, Any], tmp_path: Path) -> None:
    model, message = falls(tmp_path / "run", **settings)
    assert message.startswith("the loss became nan at step 5.")
    assert "First not finite: node 'log' (aten.log.default, forward in module 'inner'," in message
    line = line_of("return torch.log(self.level.detach())")
    assert f"test_nonfinite.py:{line} in forward" in message
    assert "What to do: look at that batch and module; lower the learning rate" in message
    assert "The model and the checkpoints hold the values from before step 5." in message
    assert model.inner.level.item() == -0.5
    assert all(bool(torch.isfinite(t).all()) for tensors in saved(tmp_path / "run").values() for t in tensors.values())
    state = RunDirectory.open(tmp_path / "run").state
    assert (state.status, state.step) == ("failed", 5)


def test_the_checkpoint_before_is_whole_and_the_metrics_stand(tmp_path: Path) -> None:
    falls(tmp_path / "run", checkpoint_every=2, log_every=1)
    assert list(saved(tmp_path / "run"))[-1] == "step-00000004"
    assert saved(tmp_path / "run")["step-00000004"]["inner.level"].item() == -0.5
    assert [r["step"] for r in RunDirectory.open(tmp_path / "run").read_metrics()] == [1, 2, 3, 4]


def test_without_a_run_directory_it_still_stops_and_says_what_would_tell_more() -> None:
    _, message = falls(False)
    assert "the loss became nan at step 5" in message
    assert "A run with a run directory (run_dir=…) goes back and finds the node." in message


# -- NaN in the data ---------------------------------------------------------------------------------------------------


def spoilt(batch: tuple[Tensor, Tensor], value: float = float("nan")) -> tuple[Tensor, Tensor]:
    inputs = batch[0].clone()
    inputs[3, 2] = value
    return inputs, batch[1]


@pytest.mark.parametrize("run_dir", ["run", False])
@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_a_nan_in_a_batch_is_told_as_such(run_dir: str | bool, steps_per_call: int, in_tmp: Path) -> None:
    batches = [*BATCHES[:4], spoilt(BATCHES[4]), BATCHES[5]]
    model = mlp()
    with pytest.raises(NonFiniteError) as caught:
        fit(model, batches, loss=cross_entropy, optimizer=torch.optim.Adam(model.parameters()), epochs=3,
            steps_per_call=steps_per_call, run_dir=run_dir, **QUIET)  # fmt: skip
    message = str(caught.value)
    assert "the loss became nan at step 5" in message
    assert "the feed '0' is not finite to begin with (1 of 32 values)" in message
    if run_dir:
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters()), "the module is as before the step"


def test_a_nan_that_does_not_come_again_is_seen_in_the_batch_at_hand(tmp_path: Path) -> None:
    spoil = iter([False] * 4 + [True] + [False] * 100)  # only the first time that the fifth batch is read

    def stream() -> Iterator[Any]:
        for batch in BATCHES:
            yield spoilt(batch) if next(spoil) else batch

    model = mlp()
    with pytest.raises(NonFiniteError) as caught:
        fit(model, stream, loss=cross_entropy, optimizer=torch.optim.Adam(model.parameters()), epochs=3,
            run_dir=tmp_path / "run", **QUIET)  # fmt: skip
    message = str(caught.value)
    assert "it did not when the steps were repeated from the last checkpoint" in message
    assert "the feed '0' is not finite to begin with (1 of 32 values)" in message
    assert all(bool(torch.isfinite(t).all()) for tensors in saved(tmp_path / "run").values() for t in tensors.values())


def test_data_that_can_be_read_only_once_is_not_repeated_but_the_batch_is_looked_at(tmp_path: Path) -> None:
    model = mlp()
    with pytest.raises(NonFiniteError) as caught:
        fit(model, iter([*BATCHES[:3], spoilt(BATCHES[3])]), loss=cross_entropy, run_dir=tmp_path / "run",
            optimizer=torch.optim.Adam(model.parameters()), epochs=1, **QUIET)  # fmt: skip
    message = str(caught.value)
    assert re.search(r"could not be repeated: .* can be read\s+only once", message)
    assert "the feed '0' is not finite to begin with" in message


# -- weights ---------------------------------------------------------------------------------------------------------


def test_weights_that_turn_nan_in_the_last_step_are_not_taken_for_trained(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.sqrt((x * self.weight).sum(1).abs()).mean()  # at 0 the gradient is NaN, and the root is not

    for run_dir in (tmp_path / "run", False):
        model = Net()
        with pytest.raises(NonFiniteError) as caught:
            fit(model, BATCHES, loss=lambda m, b: m(b[0]), optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
                steps=1, run_dir=run_dir, **QUIET)  # fmt: skip
        assert "the parameter 'weight' is no longer finite, though the loss still is, at step 1" in str(caught.value)
    assert list(saved(tmp_path / "run")) == ["step-00000000"]


def test_rows_that_the_loss_does_not_show_are_found_before_they_are_saved(tmp_path: Path) -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(6, 4, dtype=torch.float64)

        def forward(self, index: Tensor) -> Tensor:
            return self.embedding(index).sum(1).sqrt().mean()

    torch.manual_seed(0)
    model = Rows()
    with torch.no_grad():
        model.embedding.weight.abs_()
        model.embedding.weight[5] = 0  # its root has no finite slope
    indices = [torch.tensor([n]) for n in (0, 1, 5, 2, 3, 4)]
    with pytest.raises(NonFiniteError) as caught:
        fit(model, indices, loss=lambda m, b: m(b), optimizer=millrace.optim.sgd(0.1), epochs=1, run_dir=tmp_path / "r",
            **QUIET)  # fmt: skip
    message = str(caught.value)
    assert "the parameter 'embedding.weight' is no longer finite" in message
    assert "First not finite, in step 3: " in message
    assert list(saved(tmp_path / "r")) == ["step-00000000"]


def test_an_infinity_that_is_meant_does_no_harm(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf, 0.0], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.mask

    model = Masked()
    result = fit(model, [(x, y % 2 * 2) for x, y in BATCHES], loss=cross_entropy, run_dir=tmp_path / "run",
                 optimizer=torch.optim.Adam(model.parameters()), epochs=2, **QUIET)  # fmt: skip
    assert result.outcome == "finished"
