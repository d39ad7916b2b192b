"""Well-known kinds of devices, which a cluster file may name instead of stating rates.

The figures are the makers' public data-sheet rates times a stated fraction that ordinary operators reach. They are good
for planning without the device at hand; `millrace devices` measures the ones that are.
"""

from __future__ import annotations

from dataclasses import dataclass

from millrace.errors import PlacementError, did_you_mean
from millrace.place.cluster import ATTENTION, CONVOLUTION, MEMORY, PRODUCT, Device

# What part of its data-sheet rate a device is taken to reach in each class of operators.
ACHIEVABLE = {PRODUCT: 0.6, CONVOLUTION: 0.45, ATTENTION: 0.4, MEMORY: 0.75}
_GIB = 2**30


@dataclass(frozen=True)
class Preset:
    """A data sheet. `flops`: flop/s without sparsity, by precision; "" is every precision not named."""

    kind: str
    memory_bytes: int
    flops: dict[str, float]
    memory_bytes_per_s: float
    dispatch_s: float


# The rate of "" is float32 without the reduced precisions (TF32), PyTorch's default for products.
PRESETS = {
    "a100-80": Preset("cuda", 80 * _GIB, {"": 19.5e12, "bfloat16": 312e12, "float16": 312e12}, 2.039e12, 5e-6),
    "h100": Preset("cuda", 80 * _GIB, {"": 67e12, "bfloat16": 989e12, "float16": 989e12}, 3.35e12, 5e-6),
    "v100": Preset("cuda", 16 * _GIB, {"": 15.7e12, "float16": 125e12}, 0.9e12, 6e-6),
    "t4": Preset("cuda", 16 * _GIB, {"": 8.1e12, "float16": 65e12}, 0.32e12, 8e-6),
    # One core with 256-bit vectors: 3 GHz times 32 operations, and one of two memory channels of DDR4-3200.
    "cpu-core": Preset("cpu", 4 * _GIB, {"": 96e9}, 25.6e9, 5e-6),
}


def preset_device(preset: str, name: str) -> Device:
    """A device `name` of a well-known kind. Raises: PlacementError when no kind is called so."""
    if preset not in PRESETS:
        raise PlacementError(f"no kind of device is called {preset!r}. {did_you_mean(preset, list(PRESETS))}")
    sheet = PRESETS[preset]
    rates = {MEMORY: sheet.memory_bytes_per_s * ACHIEVABLE[MEMORY]}
    for operators in (PRODUCT, CONVOLUTION, ATTENTION):
        for precision, flops in sheet.flops.items():
            rates[f"{operators}.{precision}" if precision else operators] = flops * ACHIEVABLE[operators]
    return Device(name, sheet.kind, sheet.memory_bytes, rates, sheet.dispatch_s)
