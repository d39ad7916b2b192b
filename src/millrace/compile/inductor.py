"""The Inductor tier: one graph, one compiled callable, cached across processes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from millrace.compile.artifacts import artifact_path, cache_directory, read_artifact, write_artifact
from millrace.compile.eager import Compiled
from millrace.compile.inductor_private import Artifact, compile_module, has_cpp_compiler
from millrace.compile.layout import feed_strides
from millrace.compile.lower import lowered
from millrace.compile.threads import threads_for
from millrace.errors import CompileError, GraphError
from millrace.graph.graph import Graph
from millrace.graph.tracing.alone import alone

log = logging.getLogger(__name__)

NO_COMPILER = "no C++ compiler was found (install g++ or set CXX)"


def compile_inductor(graph: Graph, threads: int | None = None) -> Compiled:
    """Compile `graph`, or load it from the cache.

    Args: threads: how many its kernels are made for; `threads_for(graph)` unless given.

    Raises: CompileError with one line that says why.
    """
    threads = threads or threads_for(graph)
    path = _path(graph, threads)
    with alone:
        artifact = None if path is None else _load(path)
        try:
            module, constants = lowered(graph)
            if artifact is None:
                artifact = _compile(module, graph, threads)
                if path is not None:
                    _save(artifact, path)
        except CompileError:
            raise
        except Exception as error:
            raise CompileError(f"Inductor failed: {one_line(error)}") from error
    return _callable(artifact, graph, constants)


def load_cached(graph: Graph, threads: int) -> Compiled | None:
    """The compiled `graph` out of the cache; None when it is not there or cannot be used."""
    path = _path(graph, threads)
    with alone:
        artifact = None if path is None else _load(path)
        return None if artifact is None else _callable(artifact, graph, lowered(graph)[1])


def is_cached(graph: Graph, threads: int) -> bool:
    """Whether the cache has a whole file for the compiled `graph`."""
    path = _path(graph, threads)
    return path is not None and read_artifact(path) is not None


def one_line(error: BaseException) -> str:
    """What kind of error it is and the first line that it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else repr(error)


def _path(graph: Graph, threads: int) -> Path | None:
    """None for a graph that has no name across processes: it is compiled, but not kept."""
    try:
        return artifact_path(graph, threads)
    except GraphError as error:
        log.info("the compiled graph will not be cached: %s", error)
        return None


def _callable(artifact: Artifact, graph: Graph, constants: Sequence[Tensor]) -> Compiled:
    fetches = len(graph.fetches)

    def run(variables: Sequence[Tensor], feeds: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return list(artifact(*variables, *feeds, *constants))[:fetches]

    return run


def _compile(module: GraphModule, graph: Graph, threads: int) -> Artifact:
    if not has_cpp_compiler():
        raise CompileError(NO_COMPILER)
    fakes = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    strides = [fake.stride() for fake in fakes]
    first = len(graph.variables)
    strides[first : first + len(graph.feeds)] = feed_strides(graph)
    # Real tensors of that layout; compiling reads their metadata, not their values.
    inputs = [
        torch.empty_strided(f.shape, s, dtype=f.dtype, device=f.device) for f, s in zip(fakes, strides, strict=True)
    ]
    kernels = cache_directory() / "inductor"
    settings: dict[str, Any] = {} if threads == torch.get_num_threads() else {"cpp.threads": threads}
    if graph.steps > 1:
        # Several steps in one call are for models so small that calling their kernels from Python is a good part of a
        # step. From C++ it is not; but that takes longer to compile, and not every operator can be called so.
        try:
            return compile_module(module, inputs, settings | {"cpp_wrapper": True}, kernels)
        except Exception as error:
            log.info("kernels are called from Python: %s", one_line(error))
            module, _ = lowered(graph)
    return compile_module(module, inputs, settings, kernels)


def _load(path: Path) -> Artifact | None:
    content = read_artifact(path)
    if content is None:
        return None
    try:
        return Artifact.from_bytes(content, path.parent / "inductor")
    except Exception as error:  # its kernels may be gone, and no compiler there: only a cache miss
        log.info("compiled artifact %s cannot be used (%s); compiling anew", path, one_line(error))
        return None


def _save(artifact: Artifact, path: Path) -> None:
    # Control flow cannot be saved, a disk may be full: the artifact in hand still runs.
    with contextlib.suppress(OSError):
        try:
            content = artifact.to_bytes()
        except Exception as error:
            log.info("compiled graph cannot be cached: %s", one_line(error))
            return
        write_artifact(content, path)
