"""The cache of compiled graphs, shared by all processes of this user, so that a second start is warm."""

from __future__ import annotations

import hashlib
import os
import platform
import stat
from pathlib import Path

import torch

from millrace.errors import CompileError
from millrace.graph.graph import Graph
from millrace.graph.save import graph_digest
from millrace.version import __version__


def cache_directory() -> Path:
    """`$MILLRACE_CACHE`, or millrace under the user's cache directory; made if it is missing.

    Raises: CompileError when it cannot be made, or when it belongs to another user or others may write to it, because
    compiled artifacts are code.
    """
    named = os.environ.get("MILLRACE_CACHE")
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "millrace"
    directory = base / "compiled"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = directory.stat()
    except OSError as error:
        raise CompileError(
            f"the cache of compiled graphs {directory} cannot be made: {error.strerror}. "
            "Set MILLRACE_CACHE to a directory of your own."
        ) from error
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CompileError(
            f"the cache of compiled graphs {directory} can be written by other users, and what is in it is run. "
            f"`chmod 700 {directory}`, or set MILLRACE_CACHE to a directory of your own."
        )
    return directory


def artifact_path(graph: Graph) -> Path:
    """Where the compiled `graph` is or would be: one file for everything that decides the machine code."""
    device = "cuda:" + torch.cuda.get_device_name() if _on_cuda(graph) else torch.backends.cpu.get_cpu_capability()
    key = "\n".join(
        [
            graph_digest(graph),
            torch.__version__,
            __version__,
            platform.machine(),
            device,
            str(torch.get_num_threads()),
            _processor_flags(),
        ]
    )
    return cache_directory() / (hashlib.sha256(key.encode()).hexdigest()[:32] + ".bin")


def _on_cuda(graph: Graph) -> bool:
    return any(v.spec.device.startswith("cuda") for v in graph.variables)


def _processor_flags() -> str:
    """This processor's instruction sets, as Linux tells them; a home directory may be shared by unlike machines."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return hashlib.sha256(line.encode()).hexdigest()
    except OSError:
        pass
    return platform.processor()
