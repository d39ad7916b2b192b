"""A push and its acknowledgement as bytes: what travels in every step, so that JSON would be most of its cost.

A push: head | for each table its number, how many rows | for each table the rows (int64), their gradients. Every part
begins at a multiple of 8 bytes. Gradients that are whole lie in the mailbox, or follow on the wire.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from millrace.errors import FeedError
from millrace.graph.signature import TensorSpec
from millrace.replicas.shard_store import Rows
from millrace.runtime.messages import bytes_of

_HEAD = struct.Struct("<qqqqqd?3xI")  # the numbers of `Push` in their order, and how many tables
_TABLE = struct.Struct("<qq")
_TOLD = struct.Struct("<qqq")
_ALIGN_BYTES = 8


@dataclass(frozen=True)
class Push:
    """What a worker says beside whole gradients. dense: whether there are any."""

    sequence: int
    step: int
    version: int
    slice: int
    examples: int
    timeout_s: float
    dense: bool
    rows: Mapping[str, Rows]


@dataclass(frozen=True)
class Told:
    """That a push counts."""

    sequence: int
    version: int
    tau: int


def encode(push: Push, tables: Sequence[str]) -> bytes:
    """The bytes of a push. tables: all of the shard, in its order."""
    parts: list[bytes | memoryview] = [
        _HEAD.pack(
            push.sequence,
            push.step,
            push.version,
            push.slice,
            push.examples,
            push.timeout_s,
            push.dense,
            len(push.rows),
        )
    ]
    parts += [_TABLE.pack(tables.index(table), len(given.rows)) for table, given in push.rows.items()]
    for given in push.rows.values():
        for tensor in (given.rows, given.values):
            if tensor.nbytes:
                plain = tensor.device.type == "cpu" and tensor.is_contiguous()
                parts.append(bytes_of(tensor if plain else tensor.cpu().contiguous()))
                if tensor.nbytes % _ALIGN_BYTES:
                    parts.append(bytes(-tensor.nbytes % _ALIGN_BYTES))
    return b"".join(parts)


def decode(content: bytearray, tables: Mapping[str, TensorSpec]) -> Push:
    """The reverse of `encode`; rows and their gradients lie in `content`.

    Raises: FeedError for what is not the bytes of a push.
    """
    try:
        sequence, step, version, slice, examples, timeout_s, dense, count = _HEAD.unpack_from(content)
        heads = [_TABLE.unpack_from(content, _HEAD.size + i * _TABLE.size) for i in range(count)]
        at, rows, names = _HEAD.size + count * _TABLE.size, {}, list(tables)
        for number, length in heads:
            if number < 0 or length < 0:
                raise ValueError(f"table {number} with {length} rows")
            spec = tables[names[number]]
            found, at = _tensor(content, at, (length,), torch.int64)
            values, at = _tensor(content, at, (length, *spec.shape[1:]), spec.dtype)
            rows[names[number]] = Rows(found, values)
        return Push(sequence, step, version, slice, examples, timeout_s, dense, rows)
    except (struct.error, IndexError, ValueError) as error:
        raise FeedError(f"{len(content)} bytes came as a push, but are none: {error}") from error


def encode_told(told: Told) -> bytes:
    """The bytes of an acknowledgement."""
    return _TOLD.pack(told.sequence, told.version, told.tau)


def decode_told(content: bytearray) -> Told:
    """The reverse of `encode_told`."""
    return Told(*_TOLD.unpack(content))


def _tensor(content: bytearray, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, int]:
    """A tensor in the bytes from `at`, and where the next one begins."""
    spec = TensorSpec(shape, dtype)
    if spec.size_bytes == 0:
        return torch.empty(shape, dtype=dtype), at
    flat = torch.frombuffer(content, dtype=dtype, count=spec.size_bytes // dtype.itemsize, offset=at)
    return (flat if len(shape) == 1 else flat.view(shape)), at + spec.size_bytes + -spec.size_bytes % _ALIGN_BYTES
