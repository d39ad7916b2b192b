"""The running average that an optimizer keeps of every parameter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from millrace.errors import SettingError
from millrace.optim import Optimizer, averages_in, sgd

torch.set_num_threads(1)


def run(optimizer: Optimizer, gradients: list[float], dtype: torch.dtype = torch.float64) -> dict[str, list[float]]:
    """One parameter, which starts at 1: it and its average after every call."""
    parameters = {"w": torch.ones(1, dtype=dtype)}
    state = optimizer.init(parameters)
    found: dict[str, list[float]] = {"parameter": [], "average": []}
    for i, gradient in enumerate(gradients):
        parameters, state = optimizer.update(
            parameters, {"w": torch.full((1,), gradient, dtype=dtype)}, state, torch.tensor(i)
        )
        found["parameter"].append(float(parameters["w"]))
        found["average"].append(float(state["optimizer/w/average"]))
    return found


@settings(deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=40), st.sampled_from([0.0, 0.5, 0.9, 0.999]))
def test_the_average_follows_its_recurrence_and_leaves_training_alone(gradients: list[float], decay: float) -> None:
    found = run(replace(sgd(0.1), average=decay), gradients)
    average, parameter = 1.0, 1.0
    for t, gradient in enumerate(gradients):
        parameter -= 0.1 * gradient
        d = min(decay, (1 + t) / (10 + t))
        average = d * average + (1 - d) * parameter
        assert found["parameter"][t] == pytest.approx(parameter, abs=1e-12)
        assert found["average"][t] == pytest.approx(average, abs=1e-12)


def test_averages_of_narrow_parameters_are_kept_wide() -> None:
    found = run(replace(sgd(0.5), average=0.999), [1.0] * 30, torch.bfloat16)
    assert len(set(found["average"])) == 30  # in bfloat16, steps of a thousandth would be lost


def test_only_applied_updates_count() -> None:
    often, seldom = (
        run(replace(sgd(0.1), average=0.9, accumulate=k), [g for g in (1.0, -2.0, 3.0) for _ in range(k)])
        for k in (1, 2)
    )
    assert seldom["average"][1::2] == pytest.approx(often["average"])
    assert seldom["average"][0] == 1.0


def test_averages_are_found_among_variables_by_their_parameters_names() -> None:
    state = replace(sgd(), average=0.9, accumulate=2).init({"a.weight": torch.ones(2), "b": torch.zeros(1)})
    found: dict[str, Tensor] = averages_in({"a.weight": torch.zeros(2), "step": torch.zeros(()), **state})
    assert {name: value.tolist() for name, value in found.items()} == {"a.weight": [1.0, 1.0], "b": [0.0]}
    assert averages_in(sgd().init({"w": torch.ones(2)})) == {}


@pytest.mark.parametrize("decay", [1.0, -0.1, "much"])
def test_decays_outside_their_range_are_refused(decay: float) -> None:
    with pytest.raises(SettingError, match="average"):
        replace(sgd(), average=decay)
