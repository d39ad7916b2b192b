"""Codes of tensors: how near they bring the values, how long they are, and what they do with what is not finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from millrace.graph.signature import TensorSpec
from millrace.place.wire import CODECS, INT8_BLOCK, expected_bytes
from millrace.runtime.transport.codecs import decode, encode

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHAPES = ((), (0,), (3, 0), (1,), (7,), (16, 33), (INT8_BLOCK,), (2, INT8_BLOCK), (INT8_BLOCK + 1,), (3, 171))
LEAST_NORMAL = 2.0**-126
quick = settings(max_examples=120, deadline=None)


def through(codec: str, tensor: Tensor) -> Tensor:
    """What a receiver gets."""
    code = encode(codec, tensor)
    assert code.dtype is torch.uint8
    assert code.shape == (code.numel(),)
    assert code.numel() <= tensor.numel() * tensor.element_size()
    out = torch.full(tensor.shape, torch.nan, dtype=tensor.dtype)
    decode(codec, code.clone(), out)
    return out


def same_bits(one: Tensor, other: Tensor) -> bool:
    flat = [tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*flat)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, zeros: float, seed: int) -> Tensor:
    """Any bits, NaN and infinities among them, and a share of true zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    values[torch.rand(shape, generator=generator) < zeros] = 0
    return values.view(dtype).squeeze(-1)


def floats(dtype: type, *, width: int, finite: bool) -> st.SearchStrategy[np.ndarray]:
    shape = st.lists(st.integers(0, 600), min_size=0, max_size=1).map(tuple)
    values = st.floats(width=width, allow_nan=not finite, allow_infinity=not finite)  # type: ignore[call-overload]
    return arrays.arrays(dtype, shape, elements=values)


@quick
@given(
    st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.sampled_from([0.0, 0.3, 0.6, 0.99, 1.0]), st.integers(0, 10**6)
)
def test_zeros_is_exact_for_any_bits(shape: tuple[int, ...], dtype: torch.dtype, zeros: float, seed: int) -> None:
    values = random_bits(shape, dtype, zeros, seed)
    assert same_bits(through("zeros", values), values)


def test_zeros_keeps_negative_zeros_and_nan_and_infinities() -> None:
    values = torch.zeros(64)
    values[:5] = torch.tensor([-0.0, math.nan, math.inf, -math.inf, 1e-45])
    assert encode("zeros", values).numel() == 5 * 4 + 8
    assert same_bits(through("zeros", values), values)


@quick
@given(st.integers(1, 2000), st.floats(0, 1), st.integers(0, 10**6))
def test_a_code_of_zeros_has_a_bit_per_element_and_the_others_or_is_the_tensor(n: int, zeros: float, seed: int) -> None:
    values = torch.rand(n, generator=torch.Generator().manual_seed(seed)) + 1
    values[torch.rand(n, generator=torch.Generator().manual_seed(seed + 1)) < zeros] = 0
    kept = int(values.count_nonzero())
    assert encode("zeros", values).numel() == min(4 * kept + math.ceil(n / 8), 4 * n)


@quick
@given(floats(np.float32, width=32, finite=True) | floats(np.float64, width=64, finite=True))
def test_bfloat16_is_as_near_as_its_digits(array: np.ndarray) -> None:
    values = torch.from_numpy(array)
    found = through("bfloat16", values).double()
    exact = values.double()
    inside = exact.abs() <= 3.389e38
    error = (found - exact)[inside].abs()
    assert bool((error <= torch.maximum(2.0**-8 * exact[inside].abs(), torch.tensor(1e-40))).all())
    assert bool((found[~inside].abs() >= 3.389e38).all())


def test_bfloat16_keeps_what_is_not_finite_and_makes_the_largest_infinite() -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 3.4e38, -3.4e38])
    found = through("bfloat16", values)
    assert found[0].isnan()
    assert found[1:].tolist() == [math.inf, -math.inf, 0.0, math.inf, -math.inf]
    assert torch.signbit(found[3])


@quick
@given(floats(np.float32, width=32, finite=True) | floats(np.float64, width=32, finite=True))
def test_int8_is_off_by_half_a_quantum_of_its_block_at_most(array: np.ndarray) -> None:
    values = torch.from_numpy(array)
    found = through("int8", values)
    blocks = zip(values.reshape(-1).split(INT8_BLOCK), found.reshape(-1).split(INT8_BLOCK), strict=True)
    for exact, got in blocks:
        if exact.numel():
            largest = float(exact.abs().max())
            bound = max(largest / 254, 6e-39)
            assert float((got.double() - exact.double()).abs().max()) <= bound * (1 + 2**-16)


@quick
@given(st.sampled_from((torch.float16, torch.bfloat16)), st.integers(1, 1500), st.floats(-8, 8), st.integers(0, 10**6))
def test_int8_of_half_precision_adds_that_precisions_rounding(
    dtype: torch.dtype, n: int, power: float, seed: int
) -> None:
    values = (torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 2**power).to(dtype)
    found = through("int8", values)
    for exact, got in zip(values.split(INT8_BLOCK), found.split(INT8_BLOCK), strict=True):
        largest = float(exact.abs().max())
        bound = largest / 254 + largest * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).tiny
        assert float((got.double() - exact.double()).abs().max()) <= bound * (1 + 2**-16)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, torch.finfo(torch.float32).max])
@pytest.mark.parametrize("place", [0, INT8_BLOCK, 2 * INT8_BLOCK + 3])
def test_int8_leaves_a_tensor_with_anything_not_finite_as_it_is(bad: float, place: int) -> None:
    values = torch.randn(2 * INT8_BLOCK + 7)
    assert encode("int8", values).numel() < values.nbytes
    values[place] = bad
    assert encode("int8", values).numel() == values.nbytes
    assert same_bits(through("int8", values), values)


def test_int8_of_zeros_is_zero() -> None:
    assert through("int8", torch.zeros(INT8_BLOCK + 3)).count_nonzero() == 0


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(codec: str, dtype: torch.dtype) -> None:
    values = torch.relu(torch.randn(40, 33)).to(dtype)
    lazy = torch.complex(values.double(), values.double()).conj().imag  # negated when it is read
    for strided in (values.t(), values[::2, 1::3], values[:1].expand(5, 33), lazy):
        assert same_bits(through(codec, strided), through(codec, strided.resolve_neg().contiguous()))


@pytest.mark.parametrize("codec", ["bfloat16", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 5, INT8_BLOCK, 4096, 5001])
def test_codes_are_as_long_as_planned_or_as_the_tensor(codec: str, dtype: torch.dtype, n: int) -> None:
    spec = TensorSpec((n,), dtype)
    assert encode(codec, torch.randn(n).to(dtype)).numel() == min(expected_bytes(codec, spec), spec.size_bytes)
