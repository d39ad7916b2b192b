"""Small models, batches and losses that many tests share, and programs run in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import millrace

SOURCE = Path(millrace.__file__).parents[1]


def mlp(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """4 -> 8 -> 3."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def dropout_mlp(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """4 -> 8 -> 3, half of the hidden values dropped."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).to(dtype)


def labelled(count: int = 6, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs [count, 4] and labels [count] of three classes, which a linear model can learn."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), inputs[:, :3].argmax(1)


def cross_entropy(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def with_accuracy(model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(batch[0])
    return F.cross_entropy(logits, batch[1]), {"accuracy": (logits.argmax(1) == batch[1]).double().mean()}


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """The names whose values differ in any bit, or that only one side has."""
    return [
        name for name in sorted(a.keys() | b.keys()) if name not in a or name not in b or not a[name].equal(b[name])
    ]


def child_environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SOURCE), **changes}


def run_program(
    code: str, *arguments: object, cwd: Path, timeout_s: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own and return what it said."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd,
        env=child_environment(**environment),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
