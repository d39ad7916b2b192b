"""Clipping against torch.nn.utils.clip_grad_norm_."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.errors import SettingError
from millrace.optim import clip_by_global_norm, global_norm


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.sampled_from([(), (5,), (2, 3), (0,)]), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
    max_norm=st.sampled_from([1e-2, 1.0, 50.0]),
    seed=st.integers(0, 2**20),
)
def test_result_is_torchs_and_arguments_stay(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, scale: float, max_norm: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = {str(i): torch.randn(shape, generator=generator, dtype=dtype) * scale for i, shape in enumerate(shapes)}
    before = {name: value.clone() for name, value in gradients.items()}
    parameters = [torch.zeros_like(value, requires_grad=True) for value in gradients.values()]
    for parameter, gradient in zip(parameters, gradients.values(), strict=True):
        parameter.grad = gradient.clone()
    expected_norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    clipped, norm = clip_by_global_norm(gradients, max_norm)
    torch.testing.assert_close(norm, expected_norm)
    for parameter, (name, got) in zip(parameters, clipped.items(), strict=True):
        torch.testing.assert_close(got, parameter.grad)
        assert torch.equal(gradients[name], before[name])


def test_the_norm_is_that_of_all_gradients_as_one_vector_at_the_widest_dtype() -> None:
    norm = global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0], dtype=torch.float64)})
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx(5.0)


def test_bfloat16_norms_are_summed_wide_and_gradients_keep_their_dtype() -> None:
    # 4096 squares of 0.1 in bfloat16 would stop growing long before their sum.
    clipped, norm = clip_by_global_norm({"w": torch.full((4096,), 0.1, dtype=torch.bfloat16)}, 1.0)
    assert norm.item() == pytest.approx(6.4, rel=1e-2)
    assert clipped["w"].dtype == torch.bfloat16


def test_a_nan_is_passed_on_not_hidden() -> None:
    clipped, norm = clip_by_global_norm({"a": torch.tensor([float("nan")]), "b": torch.ones(2)}, 1.0)
    assert norm.isnan()
    assert all(value.isnan().all() for value in clipped.values())


def test_bad_arguments_are_named() -> None:
    assert clip_by_global_norm({}, 1.0)[0] == {}
    with pytest.raises(SettingError, match=r"max_norm must be a number in \(0, inf\), got 0"):
        clip_by_global_norm({"w": torch.ones(1)}, 0.0)
    with pytest.raises(SettingError, match="at least one tensor"):
        global_norm({})
