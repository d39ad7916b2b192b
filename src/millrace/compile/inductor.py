"""The Inductor tier: one graph, one compiled callable, cached across processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from millrace.compile.artifacts import artifact_path
from millrace.compile.eager import Compiled
from millrace.compile.inductor_private import Artifact, compile_module, has_cpp_compiler
from millrace.compile.lower import lowered
from millrace.errors import CompileError
from millrace.graph.graph import Graph

log = logging.getLogger(__name__)

NO_COMPILER = "no C++ compiler was found (install g++ or set CXX)"


def compile_inductor(graph: Graph) -> Compiled:
    """Compile `graph`, or load it from the cache.

    Raises: CompileError with one line that says why.
    """
    path = artifact_path(graph)
    artifact = _load(path)
    module, constants = lowered(graph)
    if artifact is None:
        artifact = _compile(module)
        _save(artifact, path)
    return _callable(artifact, constants, len(graph.fetches))


def is_cached(graph: Graph) -> bool:
    """Whether `compile_inductor` would only have to load."""
    return artifact_path(graph).exists()


def _callable(artifact: Artifact, constants: Sequence[Tensor], fetches: int) -> Compiled:
    def run(variables: Sequence[Tensor], feeds: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return list(artifact(*variables, *feeds, *constants))[:fetches]

    return run


def _compile(module: GraphModule) -> Artifact:
    if not has_cpp_compiler():
        raise CompileError(NO_COMPILER)
    inputs = [_example(node.meta["val"]) for node in module.graph.find_nodes(op="placeholder")]
    try:
        return compile_module(module, inputs, {})
    except Exception as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise CompileError(f"Inductor failed: {type(error).__name__}: {first[:300]}") from error


def _example(fake: Tensor) -> Tensor:
    """A real tensor of that layout; compiling reads its metadata, not its values."""
    return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device)


def _load(path: os.PathLike[str]) -> Artifact | None:
    try:
        return Artifact.load(path) if os.path.exists(path) else None  # type: ignore[arg-type]
    except Exception as error:  # a damaged or foreign file is only a cache miss
        log.info("compiled artifact %s cannot be read (%s); compiling anew", path, error)
        return None


def _save(artifact: Artifact, path: os.PathLike[str]) -> None:
    temporary = f"{path}.{os.getpid()}"
    try:
        artifact.save(temporary)  # type: ignore[arg-type]
        os.replace(temporary, path)
    except Exception as error:  # control flow cannot be saved, a disk may be full: the artifact in hand still runs
        log.info("compiled artifact was not cached: %s", error)
        if os.path.exists(temporary):
            os.unlink(temporary)
