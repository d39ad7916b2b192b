"""The only module that touches names of torch which torch calls private; what to mend when torch moves them.

Works with torch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

Call = Callable[..., Any]


class Artifact:
    """A compiled graph that can be called and, unless it contains control flow, saved."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        return self._inner(*inputs)

    def save(self, path: Path) -> None:
        """Write one file that `load` reads in another process, without the model's code."""
        self._inner.save(path=str(path), format="binary")

    @classmethod
    def load(cls, path: Path) -> Artifact:
        """Read what `save` wrote. The file holds machine code and pickles: only for files this user's cache wrote."""
        from torch._inductor.standalone_compile import CompiledArtifact  # Inductor takes a second to import

        return cls(CompiledArtifact.load(path=str(path), format="binary"))


def compile_module(module: GraphModule, inputs: Sequence[Tensor], options: dict[str, Any]) -> Artifact:
    """Compile with Inductor, through its caches. Raises whatever Inductor raises."""
    import torch._inductor

    with torch.no_grad():
        return Artifact(
            torch._inductor.standalone_compile(
                module, list(inputs), dynamic_shapes="from_example_inputs", options=options
            )
        )


def has_cpp_compiler() -> bool:
    """Whether Inductor finds a C++ compiler, which it needs for every CPU kernel."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:
        return False
    return True
