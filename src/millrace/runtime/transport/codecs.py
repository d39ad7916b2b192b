"""Tensors as fewer bytes, and back: pure functions for the narrowed edges of a transport.

A code is a flat uint8 tensor that is shorter than the tensor's own bytes. Where a tensor cannot be made shorter, its
own bytes take the place of the code, and the length says so.

    bfloat16  | 2 bytes of each element |
    int8      | scale of each block, float32 | code of each element: -127 … 127 |
    zeros     | elements that are not zero | bit of each element, high bit first |
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from millrace.place.wire import INT8_BLOCK

_STEPS = 127.0  # codes of one sign
_LEAST_SCALE = torch.finfo(torch.float32).tiny  # a smaller one would have few digits, or be zero
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def encode(codec: str, tensor: Tensor) -> Tensor:
    """The code of a floating-point tensor, of at most as many bytes.

    - bfloat16: elements are rounded to the nearest. Error at most 2^-8 of the element where it is in bfloat16's normal
      range (1.2e-38 to 3.39e38), at most 1e-40 below; above, it becomes infinite. NaN and infinities stay.
    - int8: of 256 consecutive elements each is rounded to a multiple of 1/127 of the largest magnitude, so the error is
      at most 1/254 of that, or 6e-39 if that is more. A tensor with anything in it that is not finite in float32, or
      within a few digits of its end (3.4e38), travels as it is.
    - zeros: exact. Elements whose bits are not all zero, as -0.0 and NaN, travel as they are. A tensor with too few
      zeros travels as it is.

    Args: codec: one of `place.wire.CODECS`. tensor: of 2, 4 or 8 bytes an element, with any strides.
    Returns: uint8, flat; it may lie in the memory of `tensor`.
    """
    # A tensor of at most one element counts as contiguous whatever its stride; only stride 1 shows as bytes.
    flat = tensor.detach().resolve_neg().contiguous().as_strided((tensor.numel(),), (1,))
    code = _ENCODERS[codec](flat)
    return _bytes(flat) if code is None else code


def decode(codec: str, code: Tensor, out: Tensor) -> None:
    """Write into `out` the tensor whose code this is.

    Args: code: as `encode` made it, in CPU memory at a multiple of 8 bytes. out: contiguous, of the tensor's shape and
    dtype.
    """
    flat = out.view(-1)
    if code.numel() == out.nbytes:
        _bytes(flat).copy_(code)
    else:
        _DECODERS[codec](code, flat)


def _encode_bfloat16(flat: Tensor) -> Tensor | None:
    return _bytes(flat.to(torch.bfloat16)) if flat.itemsize > 2 else None


def _decode_bfloat16(code: Tensor, flat: Tensor) -> None:
    flat.copy_(code.view(torch.bfloat16))


def _encode_int8(flat: Tensor) -> Tensor | None:
    values, count = flat.float(), flat.numel()
    code = torch.empty(4 * _blocks(count) + count, dtype=torch.uint8, device=flat.device)
    if code.numel() >= flat.nbytes:
        return None
    parts = _int8_parts(code, values)
    for own, scales, _ in parts:
        torch.amax(own.abs(), 1, keepdim=True, out=scales)
    scales = _scales(code, count).div_(_STEPS).clamp_(min=_LEAST_SCALE)
    if not math.isfinite(float(scales.amax() * _STEPS)):  # as large as `decode` can make an element
        return None
    for own, scales, codes in parts:
        codes.copy_((own / scales).round_())
    return code


def _decode_int8(code: Tensor, flat: Tensor) -> None:
    for own, scales, codes in _int8_parts(code, flat):
        own.copy_(codes).mul_(scales)


def _int8_parts(code: Tensor, values: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Elements [blocks, in a block], scales [blocks, 1], codes [blocks, in a block]: whole blocks, then the rest."""
    count = values.numel()
    scales = _scales(code, count)
    codes = code[4 * _blocks(count) :].view(torch.int8)
    whole = count // INT8_BLOCK
    end = whole * INT8_BLOCK
    parts = []
    if whole:
        shape = (whole, INT8_BLOCK)
        parts.append((values[:end].view(shape), scales[:whole], codes[:end].view(shape)))
    if end < count:
        parts.append((values[None, end:], scales[whole:], codes[None, end:]))
    return parts


def _scales(code: Tensor, count: int) -> Tensor:
    return code[: 4 * _blocks(count)].view(torch.float32).view(-1, 1)


def _blocks(count: int) -> int:
    return -(-count // INT8_BLOCK)


def _encode_zeros(flat: Tensor) -> Tensor | None:
    bits = _as_integers(flat).cpu().numpy()
    kept = bits != 0
    values_bytes = int(np.count_nonzero(kept)) * flat.itemsize
    code = torch.empty(values_bytes + -(-flat.numel() // 8), dtype=torch.uint8)
    if code.numel() >= flat.nbytes:
        return None
    np.compress(kept, bits, out=code[:values_bytes].numpy().view(bits.dtype))
    code[values_bytes:].numpy()[:] = np.packbits(kept)
    return code


def _decode_zeros(code: Tensor, flat: Tensor) -> None:
    count = flat.numel()
    values_bytes = code.numel() - -(-count // 8)
    kept = np.unpackbits(code[values_bytes:].numpy(), count=count).view(bool)
    integers = _as_integers(flat)
    values = code[:values_bytes].view(integers.dtype)
    integers.zero_().scatter_(0, torch.from_numpy(np.flatnonzero(kept)), values)


def _as_integers(flat: Tensor) -> Tensor:
    return flat.view(_INTEGERS[flat.itemsize])


def _bytes(flat: Tensor) -> Tensor:
    return flat.view(torch.uint8)


_ENCODERS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "bfloat16": _encode_bfloat16,
    "int8": _encode_int8,
    "zeros": _encode_zeros,
}
_DECODERS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "bfloat16": _decode_bfloat16,
    "int8": _decode_int8,
    "zeros": _decode_zeros,
}
