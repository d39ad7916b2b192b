"""The models that are measured, as numbers: what every peer, whatever its framework, builds and trains on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Workload:
    """One model with its batch and its optimizer.

    optimizer: "sgd", or "adamw" with PyTorch's defaults (betas 0.9 and 0.999, eps 1e-8, decoupled decay 0.01).
    check_steps: how many steps every peer takes before its loss is compared; a multiple of every `steps_per_call`.
    steps_per_call: a further figure with that many steps in one call, for a step that costs less than its call.
    large: made for a GPU, where few copies fit at a time; measured in bf16 alone.
    """

    name: str
    title: str
    optimizer: str
    learning_rate: float
    sizes: Mapping[str, int]
    check_steps: int = 4
    steps_per_call: int = 1
    large: bool = False


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "mlp",
            "tiny MLP 64-128-10, batch 64, SGD",
            "sgd",
            0.05,
            {"batch": 64, "inputs": 64, "hidden": 128, "classes": 10},
            check_steps=16,
            steps_per_call=16,
        ),
        Workload(
            "cnn",
            "CNN 32-64-pool-128-pool-linear, batch 64×3×32×32, AdamW",
            "adamw",
            1e-3,
            {"batch": 64, "side": 32, "classes": 10},
        ),
        Workload(
            "transformer",
            "causal transformer, 4 layers of 256, 16×128 tokens, AdamW",
            "adamw",
            1e-3,
            {"batch": 16, "tokens": 128, "vocabulary": 1000, "layers": 4, "width": 256, "heads": 4, "tied": 0},
        ),
        Workload(
            "lstm",
            "LSTM 2×256, 50 tokens × 32, AdamW",
            "adamw",
            1e-3,
            {"batch": 32, "tokens": 50, "vocabulary": 1000, "layers": 2, "width": 256},
        ),
        Workload(
            "gpt2",
            "GPT-2 small, 32×1024 tokens, AdamW",
            "adamw",
            1e-4,
            {"batch": 32, "tokens": 1024, "vocabulary": 50257, "layers": 12, "width": 768, "heads": 12, "tied": 1},
            large=True,
        ),
    )
}
STANDARD = ("mlp", "cnn", "transformer", "lstm")
