"""A driver for `test_killed_driver.py`, which kills it: `python driver_to_kill.py RUN_DIRECTORY UPDATE CLUSTER`."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millrace import Callback, Result
from millrace.replicas.settings import Async, Sync
from millrace.train.callbacks import RunView
from millrace.train.fit import fit

UPDATES: Mapping[str, Any] = {"sync": "sync", "servers": Sync(parameter_servers=1), "async": Async()}
STEPS = 60
INPUTS = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))
LABELS = INPUTS[:, :3].argmax(1)


class Slow(Callback):
    """Steps of a millisecond would hardly be met by a kill."""

    def on_step(self, run: RunView, step: int, values: Mapping[str, SupportsFloat]) -> None:
        time.sleep(0.02)


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def train(directory: Path, update: str, *, slow: bool, cluster: str | None = None) -> tuple[Result, dict[str, Tensor]]:
    """Begin a run, or go on with it. Returns: how it went, and the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)).double()
    result = fit(
        model,
        (INPUTS.double(), LABELS),
        loss=classify,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.05),
        batch_size=8,
        steps=STEPS,
        checkpoint_every=4,
        replicas=2,
        update=UPDATES[update],
        cluster=cluster,
        callbacks=[Slow()] if slow else [],
        run_dir=directory,
        resume=(directory / "state.json").exists(),
        compile="eager",
        progress=False,
        seed=3,
    )
    return result, {name: value.detach().clone() for name, value in model.state_dict().items()}


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2], slow=True, cluster=sys.argv[3] if len(sys.argv) > 3 else None)
