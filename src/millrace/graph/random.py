"""Randomness made explicit: every random operator of a step reads the variable "random".

PyTorch's generators hide their state, so that a recomputed dropout mask differs from the first one and a restored run
cannot continue the stream. Here a random operator is a pure function of (seed, counter, operator number, element): a
counter-based generator in the sense of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), with two
rounds of the 32-bit "lowbias32" integer hash. The variable "random" is int64[2]: (seed, counter); each step adds one to
the counter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

aten = torch.ops.aten

# int32 constants of lowbias32 and of Weyl's sequence (the golden ratio), as signed numbers.
_M1 = 0x7FEB352D
_M2 = 0x846CA68B - (1 << 32)
_WEYL = 0x9E3779B9 - (1 << 32)
_CHUNK = 1 << 16  # elements hashed at a time in the eager kernel, so that the passes stay in cache


def new_random(seed: int) -> Tensor:
    """The variable "random" at the start of a run: int64[2] of (seed, counter)."""
    return torch.tensor([seed, 0], dtype=torch.int64)


def slice_random(random: Tensor, index: int) -> Tensor:
    """What slice `index` of a batch sees of the variable "random": a stream of its own, at the same counter.

    Slice 0 sees the variable itself, so that one slice alone is a run without slices. The others' seeds are hashed, as
    neighbouring numbers may be the seeds of other runs.

    Args: random: int64[2] of (seed, counter). index: at least 0.
    """
    if index == 0:
        return random
    low, high = (_keys(torch.stack([random[0], torch.full_like(random[0], half)]), index)[0] for half in (0, 1))
    seed = (low.to(torch.int64) & 0x7FFFFFFF) | ((high.to(torch.int64) & 0x7FFFFFFF) << 31)
    return torch.stack([seed, random[1]])


def _hash(x: Tensor) -> Tensor:
    """lowbias32 on int32 (arithmetic wraps; a mask makes the right shifts logical)."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _M1
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _M2
    return x ^ ((x >> 16) & 0xFFFF)


def _keys(random: Tensor, op: int) -> tuple[Tensor, Tensor]:
    """Two int32 keys, 0-dim, from (seed, counter, operator number)."""
    seed, counter = (random[0] & 0x7FFFFFFF).to(torch.int32), (random[1] & 0x7FFFFFFF).to(torch.int32)
    high = ((random[0] >> 31) & 0x7FFFFFFF).to(torch.int32)
    first = _hash(_hash(_hash(seed) + high) + counter)
    first = _hash(first + (op & 0x7FFFFFFF))
    return first, _hash(first + _WEYL)


def _bits(index: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return _hash(_hash(index + first) ^ second)


def _to_unit(bits: Tensor) -> Tensor:
    """int32 bits -> float32 in [0, 1) with 24 bits of resolution."""
    return ((bits >> 8) & 0xFFFFFF).to(torch.float32) * (1.0 / (1 << 24))


def uniform_in_aten(random: Tensor, op: int, size: Sequence[int]) -> Tensor:
    """The generator as plain ATen, for compilers to fuse. float32 in [0, 1), contiguous."""
    first, second = _keys(random, op)
    index = torch.arange(math.prod(size), dtype=torch.int32, device=random.device)
    return _to_unit(_bits(index, first, second)).reshape(list(size))


@torch.library.custom_op("millrace::uniform", mutates_args=())
def uniform(random: Tensor, op: int, size: Sequence[int]) -> Tensor:
    """float32 in [0, 1) of `size`, a pure function of (random, op, element index)."""
    count = math.prod(size)
    if count <= _CHUNK or random.device.type != "cpu":
        return uniform_in_aten(random, op, size)
    first, second = _keys(random, op)
    result = torch.empty(count, dtype=torch.float32)
    for start in range(0, count, _CHUNK):
        index = torch.arange(start, min(start + _CHUNK, count), dtype=torch.int32)
        result[start : start + _CHUNK] = _to_unit(_bits(index, first, second))
    return result.reshape(list(size))


@uniform.register_fake
def _(random: Tensor, op: int, size: Sequence[int]) -> Tensor:
    return torch.empty(list(size), dtype=torch.float32, device=random.device)


class RandomStream:
    """Replaces the random operators of a step while it is traced.

    `draws` counts them: it is each operator's number, and setting it back is what restoring a generator's state means
    (activation checkpointing does so before it recomputes).
    """

    def __init__(self, random: Tensor) -> None:
        self.random = random
        self.draws = 0
        self.used = False

    def unit(self, size: Sequence[int]) -> Tensor:
        """float32 in [0, 1)."""
        self.draws += 1
        self.used = True
        return torch.ops.millrace.uniform(self.random, self.draws, list(size))

    def unit_like(self, tensor: Tensor) -> Tensor:
        """[0, 1) in the shape and floating dtype of `tensor`."""
        unit = self.unit(tensor.shape)
        # bfloat16 and float16 would round values just below 1 up to 1.
        return unit if tensor.dtype in (torch.float16, torch.bfloat16) else unit.to(_float(tensor.dtype))

    def normal(self, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Standard normal by Box and Muller (1958)."""
        radius = torch.sqrt(-2.0 * torch.log1p(-self.unit(size)))
        return (radius * torch.cos((2 * math.pi) * self.unit(size))).to(dtype)

    def integers(self, low: int, high: int, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Integers in [low, high); ranges over 2^24 are not reached everywhere."""
        return (self.unit(size).to(torch.float64) * (high - low)).floor().to(dtype) + low

    def exponential(self, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        return (-torch.log1p(-self.unit(size))).to(dtype)


def _float(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point else torch.float32


def _dtype(kwargs: dict[str, Any], like: Tensor | None = None) -> torch.dtype:
    chosen: torch.dtype | None = kwargs.get("dtype")
    if chosen is not None:
        return chosen
    return like.dtype if like is not None else torch.get_default_dtype()


Replacement = Callable[..., Any]


def _bernoulli(s: RandomStream, x: Tensor, p: Any = None, **_: Any) -> Tensor:
    probability = x if p is None else p
    return (s.unit_like(x) < probability).to(x.dtype)


def _native_dropout(s: RandomStream, x: Tensor, p: float, train: bool | None = True) -> tuple[Tensor, Tensor]:
    if train is False or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    keep = s.unit_like(x) < 1 - p
    scale = 0.0 if p == 1 else 1 / (1 - p)
    return x * keep * scale, keep


def _multinomial(s: RandomStream, p: Tensor, count: int, replacement: bool = False, **_: Any) -> Tensor:
    # Without replacement: the largest p/E with E exponential (the "exponential race").
    if not replacement:
        return (p / s.exponential(p.shape, p.dtype)).topk(count, dim=-1).indices
    cumulative = p.cumsum(-1)
    draw = s.unit([*p.shape[:-1], count]).to(p.dtype) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, draw).clamp(max=p.shape[-1] - 1)


def _in_place(make: Replacement) -> Replacement:
    def replaced(s: RandomStream, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x.copy_(make(s, x, *args, **kwargs))

    return replaced


def _uniform_like(s: RandomStream, x: Tensor, low: float = 0.0, high: float = 1.0, **_: Any) -> Tensor:
    return low + (high - low) * s.unit_like(x)


def _normal_like(s: RandomStream, x: Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> Tensor:
    return mean + std * s.normal(x.shape, _float(x.dtype))


REPLACEMENTS: dict[OpOverload, Replacement] = {
    aten.bernoulli.default: _bernoulli,
    aten.bernoulli.p: _bernoulli,
    # An argument that equals the schema's default does not reach us, and then p is not None but 0.5.
    aten.bernoulli_.float: _in_place(lambda s, x, p=0.5, **_: _bernoulli(s, x, p)),
    aten.bernoulli_.Tensor: _in_place(_bernoulli),
    aten.native_dropout.default: _native_dropout,
    aten.rand.default: lambda s, size, **k: s.unit(size).to(_dtype(k)),
    aten.rand_like.default: lambda s, x, **k: s.unit(x.shape).to(_dtype(k, x)),
    aten.randn.default: lambda s, size, **k: s.normal(size, _dtype(k)),
    aten.randn_like.default: lambda s, x, **k: s.normal(x.shape, _dtype(k, x)),
    aten.normal.Tensor_float: lambda s, mean, std=1.0, **_: mean + std * s.normal(mean.shape, mean.dtype),
    aten.normal.Tensor_Tensor: lambda s, mean, std, **_: mean + std * s.normal(mean.shape, mean.dtype),
    aten.normal.float_Tensor: lambda s, mean, std, **_: mean + std * s.normal(std.shape, std.dtype),
    aten.normal.float_float: lambda s, mean, std, size, **k: mean + std * s.normal(size, _dtype(k)),
    aten.normal_functional.default: _normal_like,
    aten.normal_.default: _in_place(_normal_like),
    aten.uniform_.default: _in_place(_uniform_like),
    aten.uniform.default: _uniform_like,
    aten.exponential_.default: _in_place(lambda s, x, rate=1.0, **_: s.exponential(x.shape, x.dtype) / rate),
    aten.randint.default: lambda s, high, size, **k: s.integers(0, high, size, k.get("dtype") or torch.int64),
    aten.randint.low: lambda s, low, high, size, **k: s.integers(low, high, size, k.get("dtype") or torch.int64),
    aten.randint_like.default: lambda s, x, high, **k: s.integers(0, high, x.shape, _dtype(k, x)),
    aten.randint_like.low_dtype: lambda s, x, low, high, **k: s.integers(low, high, x.shape, _dtype(k, x)),
    aten.randperm.default: lambda s, n, **k: s.unit([n]).argsort().to(k.get("dtype") or torch.int64),
    aten.multinomial.default: _multinomial,
}
