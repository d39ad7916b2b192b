"""What every test needs: torchvision (timm and transformers import it) must not fail beside a CPU build of torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

# The torchvision of the package index is built against CUDA. Beside a CPU build of torch its kernels do not load,
# and its import then fails where it describes two operators that nobody has declared. We declare them: no model here
# calls them. The object is kept for the whole run, because dropping it would take the operators away again.
_DECLARED = torch.library.Library("torchvision", "FRAGMENT")


def _torchvision_kernels() -> list[Path]:
    """The shared libraries of the installed torchvision; none if it is not installed."""
    spec = importlib.util.find_spec("torchvision")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return [file for folder in folders for file in Path(folder).glob("_C*.so")]


def _declare_missing_operators() -> None:
    for kernels in _torchvision_kernels():
        try:
            torch.ops.load_library(str(kernels))
        except OSError:
            for name in ("nms", "qnms"):
                _DECLARED.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_declare_missing_operators()
