"""A device for tests that PyTorch takes for an accelerator, with values: `use` makes this process have one.

It shows, without a GPU, what is computed there, and that nothing is mixed with tensors in host memory. It has no
streams and no compiler. As `tests.replicas.stand_in.member`, imported by a member of a run, it stands for the
GPUs that the environment says: see there.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import subprocess
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

_SOURCE = Path(__file__).with_name("device.cpp")
_BUILT = Path(__file__).resolve().parents[3] / ".pytest_cache" / "stand_in"


class _Module:
    """What PyTorch asks of a device's module."""

    is_available = is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    manual_seed_all = staticmethod(lambda seed: None)


@functools.cache
def use() -> torch.device:
    """The device, which this process has from now on. It is built once, which takes a quarter of a minute."""
    torch.ops.load_library(built())
    torch.utils.rename_privateuse1_backend("standin")
    torch._register_device_module("standin", _Module)
    return torch.device("standin:0")


def built() -> Path:
    """The library."""
    abi = int(torch.compiled_with_cxx11_abi())
    flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
    key = hashlib.sha256(f"{torch.__version__} {flags} {_SOURCE.read_text()}".encode()).hexdigest()[:16]
    library = _BUILT / f"{key}.so"
    _BUILT.mkdir(parents=True, exist_ok=True)
    with open(_BUILT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            partial = library.with_suffix(f".{os.getpid()}")
            where = [f"-I{path}" for path in include_paths()], [f"-L{path}" for path in library_paths()]
            command = ["g++", *flags, *where[0], str(_SOURCE), "-o", str(partial), *where[1], "-ltorch_cpu", "-lc10"]
            subprocess.run(command, check=True, timeout=170)
            partial.rename(library)
    return library
