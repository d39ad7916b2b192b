"""The only module that touches names of torch which torch calls private; what to mend when torch moves them.

Works with torch 2.11 to 2.13.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

Call = Callable[..., Any]
_KERNELS = "TORCHINDUCTOR_CACHE_DIR"
_lock = threading.RLock()  # of the environment variable


class Artifact:
    """A compiled graph that can be called and, unless it contains control flow, saved."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        return self._inner(*inputs)

    def to_bytes(self) -> bytes:
        """What `from_bytes` reads in another process, without the model's code."""
        with tempfile.TemporaryDirectory(prefix="millrace-artifact-") as directory:
            path = Path(directory) / "artifact"
            self._inner.save(path=str(path), format="binary")
            return path.read_bytes()

    @classmethod
    def from_bytes(cls, content: bytes, kernels: Path) -> Artifact:
        """The inverse of `to_bytes`. It holds code and pickles: only for what this user's cache wrote.

        Args: kernels: as for `compile_module`; what is missing there is compiled again.
        """
        from torch._inductor.standalone_compile import CompiledArtifact  # Inductor takes a second to import

        with tempfile.TemporaryDirectory(prefix="millrace-artifact-") as directory, _kernels_in(kernels):
            path = Path(directory) / "artifact"
            path.write_bytes(content)
            return cls(CompiledArtifact.load(path=str(path), format="binary"))


def compile_module(module: GraphModule, inputs: Sequence[Tensor], settings: dict[str, Any], kernels: Path) -> Artifact:
    """Compile with Inductor and its `settings`, through its caches in `kernels`. Raises whatever Inductor raises."""
    import torch._inductor

    with torch.no_grad(), _kernels_in(kernels):
        return Artifact(
            torch._inductor.standalone_compile(
                module,
                list(inputs),
                dynamic_shapes="from_example_inputs",
                options={"config_patches": settings} if settings else {},
            )
        )


def settings_digest() -> str:
    """A hash of Inductor's settings, which the user or the environment may have changed."""
    from torch._inductor import config

    # Inductor's own caches go by these: without what only says where files are and how many compile at once.
    settings = sorted((name, repr(value)) for name, value in config.save_config_portable().items())
    return hashlib.sha256(repr(settings).encode()).hexdigest()


def has_cpp_compiler() -> bool:
    """Whether Inductor finds a C++ compiler, which it needs for every CPU kernel."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:
        return False
    return True


@contextlib.contextmanager
def _kernels_in(directory: Path) -> Iterator[None]:
    """Inductor with its cache in `directory`, unless the user has chosen one.

    Its own choice is under /tmp, where kernels do not outlast a restart of the machine, and where whoever comes first
    owns the name.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    with _lock:
        before = os.environ.get(_KERNELS)
        # Inductor writes its default into the environment.
        chosen = before is not None and os.path.abspath(before) != os.path.abspath(default_cache_dir())
        if chosen:
            yield
            return
        os.environ[_KERNELS] = str(directory)
        try:
            yield
        finally:
            if before is None:
                del os.environ[_KERNELS]
            else:
                os.environ[_KERNELS] = before
