"""The memory that the C library keeps after it was freed."""

from __future__ import annotations

import ctypes
import sys


def give_back_freed_memory() -> None:
    """Return what is free to the system: steps that run compiled use little of what eager ones have left behind.

    Only glibc can be asked for it; elsewhere this does nothing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
