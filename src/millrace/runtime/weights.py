"""A module's weights in a safetensors file, under the module's own names, for any program that reads safetensors.

Tied weights (several names for one tensor) are stored once; the file's metadata says `other name: stored name`, as
`safetensors.torch.save_model` writes it, so the files go both ways.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from millrace.errors import CheckpointError, did_you_mean
from millrace.files import make_directory, replacing
from millrace.runtime.commit import write_failure
from millrace.runtime.shard import listed, open_shard, write_shard


def save_weights(module: nn.Module, path: str | Path) -> None:
    """Saves a module's parameters and buffers; the file is there all at once, or the one before it still is.

    Raises: CheckpointError when a part of the module's state is no tensor, or the file cannot be written.
    """
    path = Path(path)
    tensors = dict(module.state_dict())
    ties = {name: group[0] for group in _tied_groups(tensors) for name in group[1:]}
    for name in ties:
        del tensors[name]
    try:
        make_directory(path.parent)
        with replacing(path) as temporary:
            write_shard(temporary, tensors, metadata={**ties, "format": "pt"})
    except OSError as error:
        raise write_failure(path, sum(tensor.nbytes for tensor in tensors.values()), error) from error


def load_weights(
    module: nn.Module, path: str | Path, *, strict: bool = True, prefix: str = ""
) -> tuple[list[str], list[str]]:
    """Loads a safetensors file into a module, in place.

    Floating-point weights are converted to the module's own dtype. Nothing is changed when something does not fit.

    Args: strict: whether every name must be in both. prefix: taken off those of the file's names that begin with it.
    Returns: the module's names that the file lacks, and the file's names that the module lacks (both empty if strict).
    Raises: CheckpointError when the file is damaged, or does not fit the module.
    """
    path = Path(path)
    state = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    weights, ties = _read(path, prefix)
    for name, kept in ties.items():
        if name in state and kept in weights:
            weights.setdefault(name, weights[kept])
    _fill_tied(path, weights, _tied_groups(state))
    missing, unexpected = sorted(set(state) - set(weights)), sorted(set(weights) - set(state))
    problems = _misfits(weights, state)
    if strict and missing:
        problems.append(f"{len(missing)} of the module's {len(state)} names are not in the file: {listed(missing)}")
    if strict and unexpected:
        problems.append(f"{len(unexpected)} names of the file are not in the module: {listed(unexpected)}")
    if problems:
        raise CheckpointError(
            f"{path} does not fit this {type(module).__name__}:\n  "
            + "\n  ".join(problems[:8])
            + f"\nNothing was changed. {_advice(missing, unexpected)}"
        )
    module.load_state_dict({name: weights[name] for name in state if name in weights}, strict=False)
    return missing, unexpected


def _tied_groups(state: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of every tensor: of the same elements, not merely of shared storage."""
    groups: dict[object, list[str]] = {}
    for name, value in state.items():
        identity: object = name
        # Empty tensors all start at address 0 and are not tied.
        if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta and value.numel():
            identity = (value.device, value.dtype, value.data_ptr(), tuple(value.shape), value.stride())
        groups.setdefault(identity, []).append(name)
    return list(groups.values())


def _read(path: Path, prefix: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors under their names in the module, and the metadata's ties under theirs."""
    if path.is_file():
        with path.open("rb") as start:
            if start.read(2) == b"PK":
                raise CheckpointError(
                    f"{path} is no safetensors file; it looks like one of torch.save. Load it with torch.load(..., "
                    "weights_only=True) and module.load_state_dict, then write it anew with save_weights."
                )
    with open_shard(path) as file:
        tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in list(file.keys())}
        metadata = file.metadata() or {}
    return tensors, {name.removeprefix(prefix): kept.removeprefix(prefix) for name, kept in metadata.items()}


def _fill_tied(path: Path, weights: dict[str, Tensor], groups: list[list[str]]) -> None:
    """Gives every name of a tensor that the module ties the value that the file has for one of them."""
    for group in groups:
        present = [name for name in group if name in weights]
        for name in group if present else []:
            source = weights[present[0]]
            value = weights.setdefault(name, source)
            if value is not source and not torch.equal(value, source):
                raise CheckpointError(
                    f"{path} has different values for {present[0]!r} and {name!r}, which are one tensor in this "
                    "module. Nothing was changed. Load it into a module that does not tie them."
                )


def _misfits(weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    problems = []
    for name, target in state.items():
        value = weights.get(name)
        if value is None:
            continue
        if target.is_meta:
            problems.append(f"{name!r} is on the meta device in the module: call module.to_empty(device=...) first")
        elif value.shape != target.shape:
            problems.append(f"{name!r} is {list(value.shape)} in the file, {list(target.shape)} in the module")
        elif _kind(value) != _kind(target):
            # A conversion within a kind rounds; one between kinds would make something else of it.
            problems.append(f"{name!r} is {value.dtype} in the file, {target.dtype} in the module")
    return problems


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    if tensor.is_floating_point():
        return "floating"
    return "bool" if tensor.dtype is torch.bool else "integer"


def _advice(missing: list[str], unexpected: list[str]) -> str:
    """What to do about names that do not agree."""
    if prefix := _common_prefix(short=missing, long=unexpected):
        return (
            f"The file's names begin with {prefix!r}, as a wrapper leaves it (DataParallel: 'module.', torch.compile: "
            f"'_orig_mod.'). Take it off: load_weights(module, path, prefix={prefix!r})."
        )
    if prefix := _common_prefix(short=unexpected, long=missing):
        return (
            f"The module's names begin with {prefix!r}, the file's do not. Load into the inner module: "
            f"load_weights(module.{prefix[:-1]}, path)."
        )
    if missing and unexpected:
        return f"The first name that is missing is {missing[0]!r}. {did_you_mean(missing[0], unexpected)}"
    if missing or unexpected:
        return "Pass strict=False to load what both have."
    return "Build the module with the sizes and dtypes that the file was saved with."


def _common_prefix(*, short: list[str], long: list[str]) -> str | None:
    """The prefix that most of the long names put before a short one, if that explains half of the short ones."""
    wanted = set(short)
    counts: Counter[str] = Counter()
    for name in long:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            if ".".join(parts[cut:]) in wanted:
                counts[".".join(parts[:cut]) + "."] += 1
    if not counts:
        return None
    prefix, count = counts.most_common(1)[0]
    return prefix if 2 * count >= len(wanted) else None
