"""Whether an error means that an accelerator has failed, and not the program on it."""

from __future__ import annotations

# CUDA's numbers: devices unavailable, ECC, NVLink, hardware stack, contained memory error.
_FAULTS = frozenset({46, 214, 220, 714, 721})


def is_hardware_fault(error: BaseException | None) -> bool:
    """Whether it, or what it was raised from, is one; another process, on another device, may do better."""
    while error is not None:
        if type(error).__name__ == "AcceleratorError" and getattr(error, "error_code", None) in _FAULTS:
            return True
        error = error.__cause__
    return False
