"""Shared by all tests: one compile cache for the whole run, one thread, a working directory of each test's own.

Also: torchvision (timm and transformers import it) must not fail beside a CPU build of torch.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Inductor's caches, fresh but shared by every test and every parallel worker; the user's own stay untouched."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MILLRACE_CACHE", str(shared / "millrace-cache"))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(shared / "inductor-cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and results must not depend on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a directory of the test's own, where `fit` then puts its runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
