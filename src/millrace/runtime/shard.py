"""One file of named tensors: written, synced and hashed in one pass, and verified before a byte of it is believed.

The format is safetensors: 8 bytes with the length of the header, the header in JSON, then the plain bytes of every
tensor. The library reads it. Writing is done here, because a checkpoint needs more than the format: the checksum of
what was handed to the disk, without reading it back, and the system's own error when the disk is full.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from millrace.errors import CheckpointError, DamagedCheckpointError
from millrace.graph.signature import BESIDE
from millrace.runtime.commit import Digest

# What one turn hands to the disk and to the hash: small enough to be still in the cache for the second of them.
_CHUNK_BYTES = 4 << 20

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of all tensors in the main memory, each with storage of its own, untouched by what training does next.

    Raises: CheckpointError for a tensor that no shard can hold.
    """
    _check_storable(tensors)
    return {
        name: _plain(tensor).to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def write_shard(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> Digest:
    """Writes all tensors into one safetensors file and syncs it to the disk.

    Views, tensors that share storage and tensors on other devices are written as the values they show. The file is
    not there all at once: write it under a temporary name.

    Args: metadata: free text for the file's header.
    Returns: the checksum and size of what was written.
    Raises: CheckpointError for a tensor that no shard can hold; OSError when the disk refuses.
    """
    _check_storable(tensors)
    # Wide elements first, so that every tensor starts at a multiple of its element size, as the format asks.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    sha256, size_bytes = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for chunk in _chunks(names, tensors, metadata or {}):
            file.write(chunk)
            sha256.update(chunk)
            size_bytes += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return Digest(sha256.hexdigest(), size_bytes)


def read_shard(path: Path, expected: Digest | None) -> dict[str, Tensor]:
    """All tensors of a file, in main memory, each with storage of its own.

    Args: expected: what `write_shard` returned; None trusts the file as far as its format allows.
    Raises: DamagedCheckpointError when the file is missing, truncated or altered.
    """
    if expected is not None:
        verify(path, expected)
    with open_shard(path) as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (it is no dict)


def read_shard_into(path: Path, expected: Digest | None, targets: Mapping[str, Tensor]) -> None:
    """Reads a file straight into tensors that exist already, in place, on whatever device they are.

    Names, shapes and dtypes must agree exactly; nothing is changed unless they all do. Only what stands beside the step
    (`BESIDE`) may be in the file or not: then it is left, or becomes zero.

    Raises: DamagedCheckpointError when the file is missing, truncated or altered; CheckpointError when it belongs
    to another model.
    """
    if expected is not None:
        verify(path, expected)
    with open_shard(path) as file, torch.no_grad():
        _check_same_variables(path, file, targets)
        there = set(file.keys())
        for name, target in targets.items():
            if name in there:
                target.copy_(file.get_tensor(name))
            else:
                target.zero_()


def verify(path: Path, expected: Digest) -> None:
    """Checks that a file is the one that was written.

    Raises: DamagedCheckpointError, naming the file and what is wrong with it.
    """
    try:
        with open(path, "rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes != expected.size_bytes:
                how = "truncated" if size_bytes < expected.size_bytes else "longer than it was"
                raise DamagedCheckpointError(
                    f"{path} is {how}: {expected.size_bytes:,} bytes were written, {size_bytes:,} are there."
                )
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    if sha256 != expected.sha256:
        raise DamagedCheckpointError(
            f"{path} was altered: its sha256 is {sha256[:16]}…, {expected.sha256[:16]}… was written."
        )


@contextlib.contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """The library's lazy view of a file: `keys`, `get_tensor`, `get_slice`, `metadata`.

    Raises: DamagedCheckpointError when the file cannot be read or is no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except OSError as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except SafetensorError as error:
        raise DamagedCheckpointError(f"{path} is no whole safetensors file: {error}.") from error


def listed(names: list[str], limit: int = 6) -> str:
    """Names for a message: the first few, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more


def _plain(tensor: Tensor) -> Tensor:
    """The tensor without its graph, and without a pending conjugation or negation that its bytes do not show."""
    return tensor.detach().resolve_conj().resolve_neg()


def _chunks(names: list[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[memoryview]:
    yield memoryview(_header(names, tensors, metadata))
    for name in names:
        packed = _plain(tensors[name]).cpu().contiguous()
        # A tensor of at most one element counts as contiguous whatever its stride; only stride 1 shows as bytes.
        content = packed.as_strided((packed.numel(),), (1,)).view(torch.uint8).numpy().data
        for start in range(0, len(content), _CHUNK_BYTES):
            yield content[start : start + _CHUNK_BYTES]


def _header(names: list[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name in names:
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _check_storable(tensors: Mapping[str, object]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            problem = f"it is a {type(tensor).__name__}, not a tensor. Put it into the checkpoint's extra"
        elif tensor.layout is not torch.strided:
            problem = f"its layout is {tensor.layout}. Make it dense with .to_dense()"
        elif tensor.is_meta:
            problem = "it is on the meta device and has no values. Initialise it"
        elif tensor.dtype not in _CODES:
            problem = f"its dtype is {tensor.dtype}, which safetensors lacks. Convert or split it (view_as_real)"
        elif name == "__metadata__":
            problem = "the file format keeps this name for itself. Rename it"
        else:
            continue
        raise CheckpointError(f"The variable {name!r} cannot be saved: {problem}.")


def _check_same_variables(path: Path, file: Any, targets: Mapping[str, Tensor]) -> None:
    in_file = set(file.keys())
    problems = []
    if missing := sorted(name for name in set(targets) - in_file if not name.startswith(BESIDE)):
        problems.append(
            f"{len(missing)} of this model's {len(targets)} variables are not in the file: {listed(missing)}"
        )
    if unexpected := sorted(name for name in in_file - set(targets) if not name.startswith(BESIDE)):
        problems.append(f"{len(unexpected)} variables of the file are not in this model: {listed(unexpected)}")
    for name in sorted(in_file & set(targets)):
        view, target = file.get_slice(name), targets[name]
        found = (view.get_dtype(), list(view.get_shape()))
        wanted = (_CODES.get(target.dtype, str(target.dtype)), list(target.shape))
        if found != wanted:
            problems.append(f"{name!r} is {found[0]} {found[1]} in the file, {wanted[0]} {wanted[1]} in this model")
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more of this kind"] if len(problems) > 8 else [])
        raise CheckpointError(
            f"{path} is a checkpoint of another model:\n  " + "\n  ".join(shown) + "\nNothing was changed. Resume with "
            "the model and optimizer that it was saved with, or start a new run in a new directory."
        )
