"""The cache of compiled graphs, shared by all processes of this user, so that a second start is warm.

$MILLRACE_CACHE/compiled/<key>.bin    one compiled graph: a mark, the sha256 of the rest, the rest
                         inductor/    the kernels of all of them, where Inductor keeps them itself
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import logging
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from millrace.compile.inductor_private import settings_digest
from millrace.errors import CompileError
from millrace.files import others_may_write, replace_bytes, user_cache
from millrace.graph.graph import Graph
from millrace.graph.save import graph_digest
from millrace.version import __version__

log = logging.getLogger(__name__)

_MARK = b"millrace-artifact-1\n"
_DIGEST_BYTES = hashlib.sha256().digest_size
# What decides how a graph becomes what Inductor compiles: a change to one of them makes other machine code.
_LOWERING = ("compile/in_place.py", "compile/lower.py", "compile/inductor_private.py", "graph/random.py")


def cache_directory() -> Path:
    """`$MILLRACE_CACHE`, or millrace under the user's cache directory; made if it is missing.

    Where neither can be made or written to, a directory that ends with this process, so that compiling goes on without
    a cache.

    Raises: CompileError when it belongs to another user or others may write to it, because what is in it is run.
    """
    directory = user_cache() / "compiled"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = directory.stat()
        writable = os.access(directory, os.W_OK | os.X_OK)
        reason = "" if writable else "it may not be written to"
    except OSError as error:
        return _temporary_directory(str(directory), error.strerror or str(error))
    if others_may_write(status):
        raise CompileError(
            f"the cache of compiled graphs {directory} can be written by other users, and what is in it is run. "
            f"`chmod 700 {directory}`, or set MILLRACE_CACHE to a directory of your own."
        )
    return _temporary_directory(str(directory), reason) if reason else directory


def artifact_path(graph: Graph, threads: int) -> Path:
    """Where the compiled `graph` is or would be: one file for everything that decides the machine code.

    Raises: CompileError as `cache_directory` does; GraphError when the graph holds what no file can.
    """
    key = "\n".join(
        [
            graph_digest(graph),
            torch.__version__,
            __version__,
            _lowering_digest(),
            settings_digest(),
            str(sys.implementation.cache_tag),
            platform.machine(),
            _device(graph),
            str(threads),
            str(torch.are_deterministic_algorithms_enabled()),
            torch.get_float32_matmul_precision(),
            _processor_flags(),
        ]
    )
    return cache_directory() / (hashlib.sha256(key.encode()).hexdigest()[:32] + ".bin")


def read_artifact(path: Path) -> bytes | None:
    """What `write_artifact` wrote; None where there is none, or it is damaged, or another user's."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_uid != os.getuid():
                log.warning("compiled artifact %s belongs to another user and is not used", path)
                return None
            content = file.read()
    except OSError:
        return None
    start = len(_MARK) + _DIGEST_BYTES
    if content[:start] != _MARK + hashlib.sha256(content[start:]).digest():
        log.warning("compiled artifact %s is damaged; compiling anew", path)
        return None
    return content[start:]


def write_artifact(content: bytes, path: Path) -> None:
    """Put an artifact into the cache, whole or not at all. Raises: OSError."""
    replace_bytes(path, _MARK + hashlib.sha256(content).digest() + content)


@functools.cache
def _temporary_directory(instead_of: str, reason: str) -> Path:
    base = Path(tempfile.mkdtemp(prefix="millrace-cache-"))
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    log.warning(
        "the cache of compiled graphs %s cannot be used (%s): every start compiles anew. Set MILLRACE_CACHE to a "
        "directory of your own.",
        instead_of,
        reason,
    )
    directory = base / "compiled"
    directory.mkdir(mode=0o700)
    return directory


def _device(graph: Graph) -> str:
    devices = sorted({v.spec.device for v in graph.variables} | {f.spec.device for f in graph.feeds})
    return " ".join(
        torch.cuda.get_device_name(name) if name.startswith("cuda") else torch.backends.cpu.get_cpu_capability()
        for name in devices or ["cpu"]
    )


@functools.cache
def _lowering_digest() -> str:
    package = Path(__file__).parents[1]
    total = hashlib.sha256()
    for name in _LOWERING:
        if (package / name).is_file():  # in a zip file it is not, and there the version says it
            total.update((package / name).read_bytes())
    return total.hexdigest()


@functools.cache
def _processor_flags() -> str:
    """This processor's instruction sets, as Linux tells them; a home directory may be shared by unlike machines."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return hashlib.sha256(line.encode()).hexdigest()
    except OSError:
        pass
    return platform.processor()
