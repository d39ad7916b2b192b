"""Lion against the paper's algorithm, written in numpy; torch has no Lion."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.errors import SettingError
from millrace.optim import Group, lion
from millrace.optim.rules.lion import Lion

STEPS = 50


def paper(theta: np.ndarray, gradients: np.ndarray, lr: float, beta1: float, beta2: float, decay: float) -> np.ndarray:
    """Chen et al. 2023, algorithm 2."""
    m = np.zeros_like(theta)
    for g in gradients:
        c = beta1 * m + (1 - beta1) * g
        theta = theta - lr * (np.sign(c) + decay * theta)
        m = beta2 * m + (1 - beta2) * g
    return theta


@settings(max_examples=40, deadline=None)
@given(
    lr=st.floats(1e-5, 1e-2),
    betas=st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.0, 0.9, 0.99])),
    decay=st.sampled_from([0.0, 0.1, 1.0]),
    shape=st.sampled_from([(), (6,), (3, 2)]),
    seed=st.integers(0, 2**20),
)
def test_fifty_steps_end_where_the_papers_equations_end(
    lr: float, betas: tuple[float, float], decay: float, shape: tuple[int, ...], seed: int
) -> None:
    random = np.random.default_rng(seed)
    start, gradients = random.normal(size=shape), random.normal(size=(STEPS, *shape))
    optimizer = lion(lr, betas=betas, weight_decay=decay)
    parameters = {"w": torch.tensor(start)}
    state = optimizer.init(parameters)
    for i in range(STEPS):
        parameters, state = optimizer.update(parameters, {"w": torch.tensor(gradients[i])}, state, torch.tensor(i))
    expected = paper(start, gradients, lr, *betas, decay)
    np.testing.assert_allclose(parameters["w"].numpy(), expected, rtol=1e-12, atol=1e-12)


def test_a_zero_gradient_from_the_start_moves_nothing() -> None:
    optimizer = lion(0.1)
    parameters = {"w": torch.ones(3)}
    new, _ = optimizer.update(parameters, {"w": torch.zeros(3)}, optimizer.init(parameters), torch.tensor(0))
    assert torch.equal(new["w"], torch.ones(3))


def test_defaults_are_the_papers() -> None:
    assert lion().rule == Lion(betas=(0.9, 0.99))
    assert lion(groups=[Group("w")]).groups == (Group("w"),)


def test_bad_betas_are_named() -> None:
    with pytest.raises(SettingError, match=r"Lion: betas\[0\] must be a number in \[0, 1\), got -0.1"):
        Lion(betas=(-0.1, 0.9))
